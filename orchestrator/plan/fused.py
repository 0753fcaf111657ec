"""Stand-ins for the modules of known kinds that have a forward pass of ours on a CPU.

`orchestrator.model` holds the real ones: norm.py, gated.py, rotary.py, and fuse.py, which says what
takes part. As in `standins`, each makes, keeps and drops the same tensors in the same order.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.lengths import DENSE_LIMIT, segment_length
from orchestrator.plan.standins import PlannedLinear, back_project, project, widen

# As in model/rotary.py and model/gated.py.
ROTARY = (
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "GemmaAttention",
    "GraniteAttention",
)
_GATED = ("gate_proj", "up_proj", "down_proj")
_SILU = ("SiLU", "SiLUActivation")


def fuse(model: nn.Module) -> None:
    """Give modules of known kinds the forward pass of their stand-in."""
    for module in model.modules():
        make = _maker(module)
        if make is not None:
            module.forward = make(module)


def _maker(module: nn.Module) -> Callable[[Any], Any] | None:
    name = type(module).__name__
    # Gemma's norms multiply by 1 + weight: not the numbers of ours.
    if name.endswith("RMSNorm") and not name.startswith("Gemma"):
        return _norm if getattr(module, "weight", None) is not None else None
    if name in ROTARY:
        return _rotary
    layers = all(isinstance(getattr(module, layer, None), PlannedLinear) for layer in _GATED)
    silu = type(getattr(module, "act_fn", None)).__name__ in _SILU
    return _gated if layers and silu else None


def _norm(module: Any) -> Any:
    function: Any = _RmsNorm.apply
    return lambda hidden_states: function(hidden_states, module.weight)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.float32, copy=True)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        ctx.save_for_backward(x, scale)
        return wide.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        wide = grad.to(torch.float32, copy=True)
        normed = x.float() * scale
        product = wide * normed
        del product, normed
        return wide.to(x.dtype), None


def _gated(module: Any) -> Any:
    function: Any = _Gated.apply
    layers = (module.gate_proj, module.up_proj, module.down_proj)
    anchor = module.gate_proj.anchor
    return lambda x: function(anchor, x.reshape(-1, x.shape[-1]), layers).view(x.shape)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, rows: Tensor, layers: tuple[PlannedLinear, ...]
    ) -> Tensor:
        ctx.ins, ctx.outs = layers[:2], layers[2:]
        (gate, up), lows = project(ctx.ins, rows.to(layers[0].setting.products))
        kept = [gate.to(rows.dtype), up.to(rows.dtype)]
        (out,), out_lows = project(ctx.outs, F.silu(gate).mul_(up))
        ctx.save_for_backward(rows, *kept, *lows, *out_lows)
        ctx.split = len(lows)
        return out.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, *lows = ctx.saved_tensors
        products = ctx.ins[0].setting.products
        gate, up = gate.to(products), up.to(products)
        active = F.silu(gate)
        inner = back_project(ctx.outs, active * up, lows[ctx.split :], [grad.to(products)])
        assert inner is not None
        grads = [torch.ops.aten.silu_backward(inner * up, gate), active]
        needs = ctx.needs_input_grad[1]
        wide = back_project(ctx.ins, rows.to(products), lows[: ctx.split], grads, needs)
        return None, None if wide is None else wide.to(grad.dtype), None


def _rotary(module: Any) -> Any:
    own = module.forward
    window = getattr(module.config, "sliding_window", None) or DENSE_LIMIT
    function: Any = _Attend.apply

    def forward(
        hidden_states: Tensor,
        position_embeddings: Any = None,
        segment_lengths: tuple[int, ...] = (),
        **options: Any,
    ) -> Any:
        if max(segment_lengths) > min(DENSE_LIMIT, window):
            options |= {"segment_lengths": segment_lengths}
            return own(
                hidden_states=hidden_states, position_embeddings=position_embeddings, **options
            )
        layers = (module.q_proj, module.k_proj, module.v_proj)
        half = module.head_dim // 2
        turn = [t[0, :, None, :half].to(layers[0].setting.products) for t in position_embeddings]
        anchor, width = module.q_proj.anchor, module.head_dim
        out = function(anchor, hidden_states[0], layers, *turn, segment_lengths, width)
        return module.o_proj(out[None]), None

    return forward


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        rows: Tensor,
        layers: tuple[PlannedLinear, ...],
        cos: Tensor,
        sin: Tensor,
        lengths: tuple[int, ...],
        width: int,
    ) -> Tensor:
        ctx.layers, ctx.lengths, ctx.width = layers, lengths, width
        outs, lows = project(layers, rows.to(layers[0].setting.products))
        groups = outs[1].shape[1] // width
        query, key, value = (_grouped(out, groups, width) for out in outs)
        query, key = _turned(query), _turned(key).squeeze(2)
        value = value.squeeze(2)
        output = rows.new_empty(len(rows), outs[0].shape[1])
        kept = []
        for part, length in _segments(lengths):
            full = segment_length(length)
            q, k, v = (widen(t[:, part], full) for t in (query, key, value))
            hidden = q.new_empty(1, q.shape[1] * q.shape[2], full).expand(groups, -1, -1)
            scores = torch.baddbmm(hidden, q.flatten(1, 2), k.transpose(1, 2))
            weights = torch.softmax(scores, -1)
            del scores
            attended = torch.bmm(weights, v)
            kept.append(weights.to(rows.dtype))
            del attended
        tensors = [t.to(rows.dtype) for t in (query, key, value)]
        ctx.save_for_backward(rows, cos, sin, *tensors, *lows, *kept)
        ctx.split = 3 + len(lows)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, _, _, *tensors = ctx.saved_tensors
        products = ctx.layers[0].setting.products
        query, key, value = (t.to(products) for t in tensors[:3])
        lows, kept = tensors[3 : ctx.split], tensors[ctx.split :]
        wide = _grouped(grad, len(key), ctx.width)
        sizes = [len(key) * t[0, 0].numel() for t in (query, key, value)]
        grads = [query.new_empty(len(rows), size) for size in sizes]
        grad_query, grad_key = torch.empty_like(query), torch.empty_like(key)
        for (part, _), weights in zip(_segments(ctx.lengths), kept, strict=True):
            weights, full = weights.to(products), weights.shape[-1]
            q, k, v = (widen(t[:, part], full) for t in (query, key, value))
            q, g = q.flatten(1, 2), widen(wide[:, part].to(products), full).flatten(1, 2)
            grad_value = torch.bmm(weights.transpose(1, 2), g)
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            scores: Any = torch.empty_like(grad_weights)
            del grad_weights
            part_query = torch.bmm(scores, k)
            part_key = torch.bmm(scores.transpose(1, 2), q)
        del grad_value, part_query, part_key
        _turned(grad_query), _turned(grad_key)
        needs = ctx.needs_input_grad[1]
        grad_rows = back_project(ctx.layers, rows.to(products), lows, grads, needs)
        own = None if grad_rows is None else grad_rows.to(grad.dtype)
        return None, own, None, None, None, None, None


def _grouped(rows: Tensor, groups: int, width: int) -> Tensor:
    return rows.view(len(rows), groups, -1, width).transpose(0, 1)


def _turned(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _segments(lengths: tuple[int, ...]) -> Iterator[tuple[slice, int]]:
    start = 0
    for length in lengths:
        yield slice(start, start + length), length
        start += length
