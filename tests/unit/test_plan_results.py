"""Results of operations that were seen before: what torch itself gives, and nothing shared."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.plan import results
from orchestrator.plan.ledger import Ledger


class Seen(TorchDispatchMode):
    """Takes every operation's result from `results`, and notes which torch itself had to give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        class Asked:
            _schema = func._schema

            def __call__(_, *args: Any, **kwargs: Any) -> Any:
                self.asked.append(func.overloadpacket.__name__)
                return func(*args, **kwargs)

            def __hash__(_) -> int:
                return hash(func)

            def __eq__(_, other: object) -> bool:
                return hash(other) == hash(func)

        return results.result(Asked(), args, kwargs or {})


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(results, "_seen", {})
    yield


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def described(found: Any) -> Any:
    if isinstance(found, tuple):
        return tuple(map(described, found))
    return found.shape, found.stride(), found.dtype, found.storage_offset()


OPERATIONS: dict[str, Callable[[], Any]] = {
    "product": lambda: meta(3, 4) @ meta(4, 5),
    "transposed product": lambda: meta(4, 3).t() @ meta(4, 5),
    "mixed dtypes": lambda: meta(3, dtype=torch.bfloat16) + meta(3),
    "mean": lambda: torch.var_mean(meta(3, 4), 1),
    "cut": lambda: meta(3, 4)[:, 1:3].clone(),
    "softmax": lambda: meta(2, 3, dtype=torch.bfloat16).softmax(-1, dtype=torch.float32),
    "joined": lambda: torch.cat([meta(2, 3), meta(4, 3)]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_was_seen_is_given_as_torch_gives_it(name: str) -> None:
    expected = described(OPERATIONS[name]())
    with Seen() as mode:
        assert described(OPERATIONS[name]()) == expected
        mode.asked.clear()
        assert described(OPERATIONS[name]()) == expected
    # Views are torch's own each time.
    assert set(mode.asked) <= {"t", "transpose", "slice", "view", "detach"}


def test_each_result_has_memory_of_its_own() -> None:
    with Seen():
        first, second = (OPERATIONS["product"]().untyped_storage() for _ in range(2))
    assert first._cdata != second._cdata


def test_views_keep_the_memory_of_what_they_show() -> None:
    given = meta(4, 6)
    with Seen():
        for _ in range(2):
            for view in (given.t(), given.view(6, 4), given[1:], given.expand(2, 4, 6)):
                assert view.untyped_storage()._cdata == given.untyped_storage()._cdata


def test_an_operation_in_place_gives_what_it_was_given() -> None:
    given = meta(3, 5)
    with Seen() as mode:
        for _ in range(2):
            assert given.addmm_(meta(3, 4), meta(4, 5)) is given
    assert mode.asked.count("addmm_") == 1


def test_an_operation_in_place_on_values_is_done_each_time() -> None:
    given = torch.zeros(3)
    with Seen():
        for _ in range(3):
            given.add_(1)
    assert given.tolist() == [3, 3, 3]


def test_equal_numbers_of_other_types_are_other_operands() -> None:
    whole = torch.empty(3, dtype=torch.int64, device="meta")
    with Seen():
        assert [torch.add(whole, n).dtype for n in (1, 1.0, 1)] == [
            torch.int64,
            torch.float32,
            torch.int64,
        ]


def test_a_ledger_counts_what_was_seen_as_it_counted_it_first() -> None:
    weight = meta(8, 8)

    def events() -> list[int]:
        with Ledger([weight]) as ledger:
            x = meta(4, 8).requires_grad_()
            for _ in range(3):
                x = (x @ weight).relu_()
            x.sum().backward()
        return [size for _, size in ledger.events]

    assert events() == events() != []


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_MOST_SEEN", 4)
    with Seen():
        for size in range(1, 20):
            meta(size) + 1
    assert len(results._seen) <= 4
