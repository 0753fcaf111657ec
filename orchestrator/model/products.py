"""A frozen layer's products: in which dtype they run, its weight in it, and how they are cut."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator import processor
from orchestrator.imports import import_bitsandbytes

bnb = import_bitsandbytes()

# Outputs from which on a product is cut; tokens of a piece are a multiple of two tiles.
_FEW_OUTPUTS, _PIECE_STEP = 448, 32


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products of a base in `dtype`; activations are kept in `dtype`."""
    name = str(dtype).removeprefix("torch.")
    return getattr(torch, processor.product_dtype(name, device.type == "cuda"))


def compiles(weight: Tensor) -> bool:
    """Whether a product with a base's weight is compiled for each number of tokens."""
    on_cpu = weight.device.type == "cpu"
    return on_cpu and product_dtype(weight.dtype, weight.device) == torch.bfloat16


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight as (out, in), dequantized where it is stored in 4 bit."""
    weight: Any = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return _dequantized(weight, dtype)
    dense = weight.t() if type(layer).__name__ == "Conv1D" else weight
    return dense.to(dtype)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows (tokens, inputs) times weight (inputs, outputs), plus bias (outputs,)."""
    count = _pieces(rows, weight)
    if count == 1:
        return rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    out = rows.new_empty(len(rows), weight.shape[1])
    for part in _cut(len(rows), count):
        if bias is None:
            torch.mm(rows[part], weight, out=out[part])
        else:
            torch.addmm(bias, rows[part], weight, out=out[part])
    return out


def add_product(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Add rows times weight to `total` (tokens, outputs)."""
    for part in _cut(len(rows), _pieces(rows, weight)):
        total[part].addmm_(rows[part], weight)


def _pieces(rows: Tensor, weight: Tensor) -> int:
    """In how many products one is faster.

    oneDNN (3.12, AMX) gives one of several threads all the work where there are more tokens than
    outputs: on two cores 1024 x 1536 x 576 reached 1.3 TFLOP/s whole, 2.3 in two pieces, and 1024 x
    576 x 1536 reached 2.5 whole. Of few outputs there is too little to share.
    """
    tokens, outputs = len(rows), weight.shape[1]
    if tokens < outputs or outputs < _FEW_OUTPUTS or rows.dtype != torch.bfloat16:
        return 1
    if rows.is_cuda or torch.get_num_threads() == 1 or not processor.has_amx():
        return 1
    return -(-tokens * 10 // (9 * outputs))


def _cut(tokens: int, count: int) -> Iterator[slice]:
    size = max(1, -(-tokens // (count * _PIECE_STEP))) * _PIECE_STEP
    return (slice(start, start + size) for start in range(0, tokens, size))


def _dequantized(weight: Any, dtype: torch.dtype) -> Tensor:
    state = weight.quant_state
    if dtype == state.dtype:
        return bnb.functional.dequantize_4bit(weight.data, state)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    return torch.ops.bitsandbytes.dequantize_4bit(
        weight.data, absmax.float(), state.blocksize, state.quant_type, state.shape, dtype
    )
