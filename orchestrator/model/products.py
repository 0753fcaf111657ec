"""In which dtype a frozen layer's products run, and its weight in that dtype."""

from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from orchestrator import processor


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products of a base in `dtype`; activations are kept in `dtype`."""
    name = str(dtype).removeprefix("torch.")
    return getattr(torch, processor.product_dtype(name, device.type == "cuda"))


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight as (out, in), dequantized where it is stored in 4 bit."""
    weight: Any = layer.weight
    if isinstance(layer, Linear4bit):
        return _dequantized(weight, dtype)
    dense = weight.t() if type(layer).__name__ == "Conv1D" else weight
    return dense.to(dtype)


def _dequantized(weight: Any, dtype: torch.dtype) -> Tensor:
    state = weight.quant_state
    if dtype == state.dtype:
        return bnb.dequantize_4bit(weight.data, state)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    return torch.ops.bitsandbytes.dequantize_4bit(
        weight.data, absmax.float(), state.blocksize, state.quant_type, state.shape, dtype
    )
