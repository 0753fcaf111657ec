"""A frozen linear layer with the LoRA of every tenant whose tokens lie in the row.

The base's product runs once over the whole row; each tenant's low-rank product runs over its own
contiguous span of tokens. Adapter gradients are added straight to the tenant's float32 gradient,
so that autograd carries nothing but activations.
"""

from dataclasses import dataclass, field
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """One adapter's part in one layer.

    Shapes: a (rank, inputs), b (rank, outputs) is B transposed; grad_a and grad_b are their
    float32 gradients. `seed` decides the dropout masks together with the segment's own key.
    """

    a: Tensor
    b: Tensor
    grad_a: Tensor
    grad_b: Tensor
    scaling: float
    dropout: float
    seed: int


@dataclass
class Placement:
    """Which adapter owns which tokens of the row; shared by all layers of a base.

    spans: (adapter id, start, stop), without overlap. dropout_keys: one (start, stop, key) for
    each segment; empty while nothing is dropped (evaluation, generation).
    """

    spans: tuple[tuple[int, int, int], ...] = ()
    dropout_keys: tuple[tuple[int, int, int], ...] = ()
    # A leaf that needs a gradient, so that autograd visits the first layer too; never written to.
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))


class LoraLinear(nn.Module):
    """Wraps a `Linear4bit`, `Linear` or GPT-2 `Conv1D` of the base."""

    in_features: int
    out_features: int
    compute_dtype: torch.dtype
    device: torch.device

    def __init__(self, base: nn.Module, placement: Placement) -> None:
        super().__init__()
        self.base = base
        self.placement = placement
        self.slots: dict[int, Slot] = {}
        weight: Any = base.weight
        state = getattr(weight, "quant_state", None)
        shape = tuple(state.shape if state is not None else weight.shape)
        transposed = type(base).__name__ == "Conv1D"
        self.out_features, self.in_features = shape[::-1] if transposed else shape
        self.compute_dtype = state.dtype if state is not None else weight.dtype
        self.device = weight.device

    def weight(self) -> Tensor:
        """The base's weight (out, in) in the compute dtype, dequantized on each call."""
        return dense_weight(self.base)

    def forward(self, x: Tensor) -> Tensor:
        """Apply base and adapters to x of shape (..., inputs)."""
        rows = x.reshape(-1, x.shape[-1])
        spans = [
            (self.slots[owner], start, rows.shape[0] if stop < 0 else stop)
            for owner, start, stop in self.placement.spans
            if owner in self.slots
        ]
        if torch.is_grad_enabled():
            function: Any = _LoraProduct.apply
            out = function(self.placement.anchor, rows, self, spans)
        else:
            out, _ = _product(rows, self, spans)
        return out.view(*x.shape[:-1], self.out_features)


def dense_weight(layer: nn.Module) -> Tensor:
    """A linear layer's weight as (out, in), dequantized where it is stored in 4 bit."""
    weight: Any = layer.weight
    if isinstance(layer, Linear4bit):
        return bnb.dequantize_4bit(weight.data, weight.quant_state)
    return weight.t() if type(layer).__name__ == "Conv1D" else weight


def _product(
    rows: Tensor, layer: LoraLinear, spans: list[tuple[Slot, int, int]]
) -> tuple[Tensor, list[Tensor]]:
    """The layer's output (tokens, out), and each span's scaled low-rank input (span, rank)."""
    weight = layer.weight()
    bias: Any = layer.base.bias
    out = rows @ weight.t() if bias is None else torch.addmm(bias.to(rows.dtype), rows, weight.t())
    lows = []
    for slot, start, stop in spans:
        inputs = rows[start:stop]
        masks = _dropout_mask(slot, inputs, start, layer.placement)
        low = (inputs if masks is None else inputs * masks) @ slot.a.t()
        low *= slot.scaling
        out[start:stop].addmm_(low, slot.b)
        lows.append(low)
    return out, lows


def _dropout_mask(slot: Slot, inputs: Tensor, start: int, placement: Placement) -> Tensor | None:
    """(span, inputs) of 0 or 1/(1-p), or None where nothing is dropped.

    A segment's mask hangs on the adapter's seed, the layer and the segment's key alone, so that
    it is the same in whatever row and on whatever worker the segment is passed.
    """
    if not slot.dropout or not placement.dropout_keys:
        return None
    mask = torch.empty_like(inputs)
    keep = 1 - slot.dropout
    generator = torch.Generator(device=inputs.device)
    for first, last, key in placement.dropout_keys:
        if start <= first < start + inputs.shape[0]:
            generator.manual_seed((slot.seed ^ (key * 0x9E3779B97F4A7C15)) & (2**63 - 1))
            mask[first - start : last - start].bernoulli_(keep, generator=generator)
    return mask.div_(keep)


class _LoraProduct(torch.autograd.Function):
    """Forward and backward of `LoraLinear`; each dequantizes the base's weight, none keeps it."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        rows: Tensor,
        layer: LoraLinear,
        spans: list[tuple[Slot, int, int]],
    ) -> Tensor:
        out, lows = _product(rows, layer, spans)
        # The input is kept for the gradient of A only.
        ctx.save_for_backward(rows if spans else None, *lows)
        ctx.layer, ctx.spans = layer, spans
        ctx.dropout_keys = layer.placement.dropout_keys
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *lows = ctx.saved_tensors
        layer: LoraLinear = ctx.layer
        inputs_need_it = ctx.needs_input_grad[1]
        grad_rows = grad @ layer.weight() if inputs_need_it else None
        for (slot, start, stop), low in zip(ctx.spans, lows, strict=True):
            part, inputs = grad[start:stop], rows[start:stop]
            slot.grad_b.add_(low.t() @ part)
            grad_low = part @ slot.b.t()
            grad_low *= slot.scaling
            keys = Placement(dropout_keys=ctx.dropout_keys, anchor=layer.placement.anchor)
            mask = _dropout_mask(slot, inputs, start, keys)
            slot.grad_a.add_(grad_low.t() @ (inputs if mask is None else inputs * mask))
            if grad_rows is not None:
                if mask is None:
                    grad_rows[start:stop].addmm_(grad_low, slot.a)
                else:
                    grad_rows[start:stop].add_((grad_low @ slot.a).mul_(mask))
        return None, grad_rows, None, None
