"""A frozen linear layer with the LoRA of every tenant whose tokens lie in the row.

The base's product runs once over the whole row; each tenant's low-rank product runs over its own
contiguous span of tokens. Adapter gradients are added straight to the tenant's float32 gradient,
so that autograd carries nothing but activations. Layers that take the same input are passed
together: their A matrices are one product.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.errors import ModelError
from orchestrator.model.products import add_product, dense_weight, product, product_dtype


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


class ThreadPlacement(Placement, threading.local):
    """One for each thread, which passes a row of its own.

    On a CPU only: on CUDA a thread of torch's runs the backward pass, in which layers that are
    recomputed ask for their placement again.
    """


@dataclass(frozen=True)
class Part:
    """What one adapter does to some of the layers that share an input.

    members: (place of the layer, its slot), with one scaling. dropout_keys: as in `Placement`.
    """

    members: tuple[tuple[int, Slot], ...]
    start: int
    stop: int
    dropout_keys: tuple[tuple[int, int, int], ...]

    @property
    def tokens(self) -> slice:
        """The part's tokens of the row."""
        return slice(self.start, self.stop)

    @property
    def scaling(self) -> float:
        """Factor on the low-rank product."""
        return self.members[0][1].scaling

    @property
    def ranks(self) -> list[int]:
        """Rank in each member."""
        return [slot.a.shape[0] for _, slot in self.members]

    def stacked_a(self) -> Tensor:
        """(ranks, inputs): the members' A one below the other."""
        matrices = [slot.a for _, slot in self.members]
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)

    def dropout_mask(self, rows: Tensor) -> Tensor | None:
        """(tokens, inputs) of 0 or 1/(1-p) for the part's tokens; None where nothing is dropped.

        A segment's mask hangs on the adapter's seed, the layer and the segment's key alone, so
        that it is the same in whatever row and on whatever worker the segment is passed.
        """
        slot = self.members[0][1]
        if not slot.dropout or not self.dropout_keys:
            return None
        mask = torch.empty_like(rows[self.tokens])
        keep = 1 - slot.dropout
        generator = torch.Generator(device=rows.device)
        for first, last, key in self.dropout_keys:
            if self.start <= first < self.stop:
                generator.manual_seed((slot.seed ^ (key * 0x9E3779B97F4A7C15)) & (2**63 - 1))
                mask[first - self.start : last - self.start].bernoulli_(keep, generator=generator)
        return mask.div_(keep)


class LoraLinear(nn.Module):
    """Wraps a `Linear4bit`, `Linear` or GPT-2 `Conv1D` of the base.

    Attributes:
        compute_dtype: of its input and output. product_dtype: in which it multiplies.
    """

    in_features: int
    out_features: int
    compute_dtype: torch.dtype
    product_dtype: torch.dtype
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
        self.product_dtype = product_dtype(self.compute_dtype, self.device)

    def weight(self) -> Tensor:
        """The base's weight (out, in) in the products' dtype, dequantized on each call."""
        return dense_weight(self.base, self.product_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply base and adapters to x of shape (..., inputs)."""
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():
            function: Any = _LoraProduct.apply
            out = function(self.placement.anchor, rows, self)
        else:
            wide = rows.to(self.product_dtype)
            (out,), _ = project((self,), wide, parts((self,), len(rows)))
            out = out.to(rows.dtype)
        return out.view(*x.shape[:-1], self.out_features)


def parts(layers: Sequence[LoraLinear], tokens: int) -> list[Part]:
    """The adapters' parts in layers that share an input of `tokens` tokens."""
    placement = layers[0].placement
    if max((end for _, _, end in placement.spans), default=-1) not in (-1, tokens):
        raise ModelError(
            "The model passes other rows than its tokens through a layer with an adapter, as some "
            "mixtures of experts do; name the layers around them in lora.target_modules"
        )
    found = []
    for owner, start, end in placement.spans:
        stop = tokens if end < 0 else end
        members = [(n, la.slots[owner]) for n, la in enumerate(layers) if owner in la.slots]
        # With dropout every layer has an input of its own.
        alone = bool(placement.dropout_keys) and any(slot.dropout for _, slot in members)
        groups = [(member,) for member in members] if alone else [tuple(members)]
        found += [Part(group, start, stop, placement.dropout_keys) for group in groups if group]
    return found


def project(
    layers: Sequence[LoraLinear], rows: Tensor, found: Sequence[Part]
) -> tuple[list[Tensor], list[Tensor]]:
    """Each layer's output (tokens, out), and each part's low-rank input (span, ranks).

    Rows and results are in the products' dtype.
    """
    outs = [_frozen_product(layer, rows) for layer in layers]
    lows = []
    for part in found:
        mask = part.dropout_mask(rows)
        inputs = rows[part.tokens] if mask is None else rows[part.tokens] * mask
        low = inputs @ part.stacked_a().t()
        for (place, slot), own in zip(part.members, low.split(part.ranks, 1), strict=True):
            outs[place][part.tokens].addmm_(own, slot.b, alpha=part.scaling)
        lows.append(low)
    return outs, lows


def back_project(
    layers: Sequence[LoraLinear],
    rows: Tensor | None,
    found: Sequence[Part],
    lows: Sequence[Tensor],
    grads: Sequence[Tensor],
    needs_input: bool = True,
) -> Tensor | None:
    """The gradient of `rows`; the adapters' is added to their own.

    Args:
        layers: as `project` had them.
        rows: as `project` had them; None where no adapter has a part in these layers.
        found: as `project` had them.
        lows: what it gave.
        grads: gradient of each of its outputs, in the products' dtype.
        needs_input: whether the gradient of `rows` is wanted.
    """
    grad_rows = None
    if needs_input:
        grad_rows = product(grads[0], layers[0].weight())
        for layer, grad in zip(layers[1:], grads[1:], strict=True):
            add_product(grad_rows, grad, layer.weight())
    if rows is None:
        return grad_rows
    for part, low in zip(found, lows, strict=True):
        grad_low = torch.empty_like(low)
        pieces = zip(low.split(part.ranks, 1), grad_low.split(part.ranks, 1), strict=True)
        for (place, slot), (own, own_grad) in zip(part.members, pieces, strict=True):
            grad = grads[place][part.tokens]
            _accumulate(slot.grad_b, own.t(), grad, part.scaling)
            torch.mm(grad, slot.b.t(), out=own_grad)
        _back_low(part, rows, grad_low, grad_rows)
    return grad_rows


def _back_low(part: Part, rows: Tensor, grad_low: Tensor, grad_rows: Tensor | None) -> None:
    mask = part.dropout_mask(rows)
    inputs = rows[part.tokens] if mask is None else rows[part.tokens] * mask
    if len(part.members) == 1:
        _accumulate(part.members[0][1].grad_a, grad_low.t(), inputs, part.scaling)
    else:
        grad_a = grad_low.t() @ inputs
        for (_, slot), own in zip(part.members, grad_a.split(part.ranks), strict=True):
            slot.grad_a.add_(own, alpha=part.scaling)
    if grad_rows is None:
        return
    if mask is None:
        grad_rows[part.tokens].addmm_(grad_low, part.stacked_a(), alpha=part.scaling)
    else:
        grad = grad_low @ part.stacked_a()
        grad_rows[part.tokens].add_(grad.mul_(mask), alpha=part.scaling)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """Add scaling * left @ right to a float32 matrix."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scaling)
    else:
        total.add_(left @ right, alpha=scaling)


def _frozen_product(layer: LoraLinear, rows: Tensor) -> Tensor:
    weight, bias = layer.weight(), getattr(layer.base, "bias", None)
    return product(rows, weight.t(), None if bias is None else bias.to(rows.dtype))


class _LoraProduct(torch.autograd.Function):
    """Forward and backward of `LoraLinear`; each dequantizes the base's weight, none keeps it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, layer: LoraLinear) -> Tensor:
        ctx.parts = parts((layer,), len(rows))
        (out,), lows = project((layer,), rows.to(layer.product_dtype), ctx.parts)
        # The input is kept for the gradient of A only.
        ctx.save_for_backward(rows if lows else None, *lows)
        ctx.layer = layer
        return out.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *lows = ctx.saved_tensors
        layer: LoraLinear = ctx.layer
        wide = None if rows is None else rows.to(layer.product_dtype)
        grads = [grad.to(layer.product_dtype)]
        grad_rows = back_project((layer,), wide, ctx.parts, lows, grads, ctx.needs_input_grad[1])
        return None, None if grad_rows is None else grad_rows.to(grad.dtype), None
