"""The plan's attention on CUDA: which of its ways is taken, and what each holds."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.model import attention
from orchestrator.plan import standins
from orchestrator.plan.fit import Need, Settled
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.machine import Machine
from orchestrator.plan.passes import pass_bytes
from orchestrator.plan.shapes import Shape, read_shape
from tests.unit.test_plan import GIB, make_job, make_pass

HEADS, GROUPS, TOKENS = 8, 2, 1024


def shape_of(base: str) -> Shape:
    return read_shape(make_job(base).model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "value"), [(64, 64), (96, 64), (100, 100), (256, 256)])
def test_the_kernel_is_chosen_as_the_model_chooses_it(
    dtype: torch.dtype, width: int, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_varlen_device", lambda index: True)
    tensors: list[Any] = [
        SimpleNamespace(
            is_cuda=True, dtype=dtype, shape=(1, 2, 3, size), device=SimpleNamespace(index=0)
        )
        for size in (width, value)
    ]
    assert standins._takes_varlen(*tensors) == attention._has_varlen(*tensors)


def flash_peak(segments: int, width: int = 64, groups: int = GROUPS) -> int:
    """Bytes that the variable-length kernel holds at most, forward and backward."""
    query, key, value = (
        torch.empty(heads, TOKENS, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for heads in (HEADS, groups, groups)
    )
    function: Any = standins._Flash.apply
    with Ledger((query, key, value), 512) as ledger:
        out = function(query, key, value, (TOKENS // segments,) * segments)
        out.backward(out.detach())
    return ledger.peak


def test_the_kernel_takes_128_rows_more_for_each_segment() -> None:
    # A float32 accumulator of the query's gradient, and one number a row and head.
    assert flash_peak(9) - flash_peak(1) == 4 * 128 * 8 * HEADS * (64 + 1)
    # Its width is a multiple of 32.
    grown = flash_peak(9, width=72) - flash_peak(1, width=72)
    assert grown == 4 * 128 * 8 * HEADS * (96 + 1)


def test_key_heads_of_several_query_heads_have_a_gradient_of_each() -> None:
    own = 2 * 2 * TOKENS * 64
    # Inputs made contiguous and gradients of six more key heads, of keys and of values; but no
    # gradients of each query head.
    more = flash_peak(1, groups=HEADS) - flash_peak(1)
    assert more == 2 * 6 * own - HEADS * own


def test_a_gpu_without_the_kernel_keeps_keys_of_each_query_head() -> None:
    shape = shape_of("meta-llama/Llama-3.1-8B")
    more = kept_more_without_varlen(shape, 8192)
    # Keys and values of 32 heads, not of 8.
    assert more > 0.9 * shape.layers * 2 * 24 * 8192 * 128 * 2


def test_a_gpu_without_the_kernel_keeps_scores_where_there_is_a_window() -> None:
    shape = shape_of("mistralai/Mistral-7B-v0.1")
    more = kept_more_without_varlen(shape, 6000)
    # Float32 probabilities of all pairs; the window is of 4096 tokens.
    assert more > shape.layers * 4 * 32 * 6000**2


def kept_more_without_varlen(shape: Shape, tokens: int) -> int:
    new = make_pass(shape, (tokens,), cuda=True, dtype="float16", products="float16")
    return pass_bytes(shape, replace(new, varlen=False)).kept - pass_bytes(shape, new).kept


@pytest.mark.parametrize(
    ("short", "trials", "segments"), [(128, 1, 16), (512, 1, 8), (16, 8, 128), (16, 32, 256)]
)
def test_a_row_of_short_examples_is_planned_too(short: int, trials: int, segments: int) -> None:
    """As many as the steps of all trials have, of a batch of 16 each."""
    machine = Machine(True, 80 * GIB, 0, 1, True, False)
    job = make_job("HuggingFaceTB/SmolLM2-135M")
    need = Need(shape_of(job.model.base), machine, job, trials, 2048, short=short)
    long, small = Settled(need, 4096, False)._passes()
    assert long.lengths == (2048, 2048)
    assert (sum(small.lengths), len(small.lengths)) == (4096, segments)
