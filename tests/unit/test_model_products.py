"""Products are cut where a processor with AMX is faster so; the numbers stay."""

from collections.abc import Iterator

import pytest
import torch

from orchestrator import processor
from orchestrator.model import products
from orchestrator.model.products import add_product, product


@pytest.fixture(autouse=True)
def two_threads_and_amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(processor, "has_amx", lambda: True)
    yield
    torch.set_num_threads(before)


# tokens, inputs, outputs, in how many pieces
SHAPES = [(1024, 64, 576, 2), (960, 64, 512, 3), (640, 64, 448, 2), (500, 64, 450, 2)]
WHOLE = [(1024, 64, 1536, 1), (1024, 64, 256, 1), (512, 64, 576, 1), (1, 64, 576, 1)]


@pytest.mark.parametrize(("tokens", "inputs", "outputs", "count"), [*SHAPES, *WHOLE])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_cut_product_is_the_same(
    tokens: int, inputs: int, outputs: int, count: int, transposed: bool
) -> None:
    torch.manual_seed(0)
    rows = torch.randn(tokens, inputs).bfloat16()
    weight = torch.randn(inputs, outputs).bfloat16()
    if transposed:
        weight = weight.t().contiguous().t()
    assert products._pieces(rows, weight) == count
    exact = rows.double() @ weight.double()
    allowed = 2**-7 * exact.abs().max().item()
    assert torch.allclose(product(rows, weight).double(), exact, atol=allowed)
    bias = torch.randn(outputs).bfloat16()
    found = product(rows, weight, bias).double()
    assert torch.allclose(found, exact + bias.double(), atol=allowed)
    total = torch.ones(tokens, outputs).bfloat16()
    add_product(total, rows, weight)
    assert torch.allclose(total.double(), exact + 1, atol=2 * allowed)


def test_other_products_are_left_whole() -> None:
    weight = torch.randn(64, 576)
    assert products._pieces(torch.randn(1024, 64), weight) == 1
    torch.set_num_threads(1)
    assert products._pieces(torch.randn(1024, 64).bfloat16(), weight.bfloat16()) == 1
