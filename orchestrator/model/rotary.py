"""Queries, keys and values with rotary positions and the attention of short segments, as one.

What `attention._DenseSegments` does for a model's own queries, keys and values, and the products
and the rotation before it, without the copies between them. Heads that share keys lie together:
(groups, tokens, heads of the group, width), so that each group's scores are one product.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.lengths import DENSE_LIMIT, segment_length
from orchestrator.model.attention import future, widen
from orchestrator.model.lora import LoraLinear, Part, back_project, parts, project

# Names of its linear layers.
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Whose forward pass is: project, rotate by halves, attend, project.
_KINDS = (
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "GemmaAttention",
    "GraniteAttention",
)


def is_rotary(module: nn.Module) -> bool:
    """Whether a module is an attention layer of a known kind."""
    return type(module).__name__ in _KINDS


def fits(module: Any, lengths: tuple[int, ...]) -> bool:
    """Whether segments of these lengths are short enough to keep their probabilities."""
    window = getattr(module.config, "sliding_window", None) or DENSE_LIMIT
    return max(lengths) <= min(DENSE_LIMIT, window)


def attend(
    module: Any, x: Tensor, positions: tuple[Tensor, Tensor], lengths: tuple[int, ...]
) -> Tensor:
    """The attention layer's output for a packed row.

    Args:
        module: of a known kind.
        x: (1, tokens, hidden).
        positions: cosine and sine, (1, tokens, width), equal in their two halves.
        lengths: the segments' lengths, summing to tokens.
    """
    layers = (module.q_proj, module.k_proj, module.v_proj)
    half = module.head_dim // 2
    cos, sin = (t[0, :, None, :half].to(layers[0].product_dtype) for t in positions)
    placed = parts(layers, x.shape[1])
    layout = _Layout(layers, placed, lengths, module.head_dim, module.scaling)
    if torch.is_grad_enabled():
        function: Any = _Attend.apply
        out = function(module.q_proj.placement.anchor, x[0], (cos, sin), layout)
    else:
        out = _attend_once(x[0], (cos, sin), layout)
    return module.o_proj(out[None])


class _Layout(NamedTuple):
    """What of a layer and a row decides its attention, the numbers left out.

    layers: of queries, keys and values. parts: where in the row each adapter is at work. lengths:
    of the segments. width: of a head. scale: factor on the scores.
    """

    layers: tuple[LoraLinear, ...]
    parts: list[Part]
    lengths: tuple[int, ...]
    width: int
    scale: float


def _attend_once(rows: Tensor, turn: tuple[Tensor, Tensor], layout: _Layout) -> Tensor:
    """`_Attend`'s output where no backward pass follows.

    By torch's own kernel, which skips the future and keeps no scores: a third of the time.
    """
    output, query, key, value, _ = _heads(rows, turn, layout)
    wide = _grouped(output, len(query), layout.width)
    for part, length in _segments(layout.lengths):
        full = segment_length(length)
        q, k, v = (widen(t[:, part], full).transpose(1, 2) for t in (query, key, value))
        k, v = k.expand_as(q), v.expand_as(q)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layout.scale)
        wide[:, part] = found[:, :, :length].transpose(1, 2)
    return output


def _heads(
    rows: Tensor, turn: tuple[Tensor, Tensor], layout: _Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Room for the output, turned queries and keys, values, and the adapters' inner products.

    Heads are (groups, tokens, heads of a group, width); keys and values have one of a group.
    """
    layers, width = layout.layers, layout.width
    outs, lows = project(layers, rows.to(layers[0].product_dtype), layout.parts)
    groups = outs[1].shape[1] // width
    query, key, value = (_grouped(out, groups, width) for out in outs)
    output = rows.new_empty(len(rows), outs[0].shape[1])
    return output, _turned(query, *turn), _turned(key, *turn), value, lows


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, rows: Tensor, turn: tuple[Tensor, Tensor], layout: _Layout
    ) -> Tensor:
        ctx.layout = layout
        _, _, lengths, width, scale = layout
        output, query, key, value, lows = _heads(rows, turn, layout)
        groups, key, value = len(query), key.squeeze(2), value.squeeze(2)
        wide, kept = _grouped(output, groups, width), []
        for part, length in _segments(lengths):
            full = segment_length(length)
            q, k, v = (widen(t[:, part], full) for t in (query, key, value))
            hidden = future(full, q.shape[2], q.dtype).expand(groups, -1, -1)
            scores = torch.baddbmm(hidden, q.flatten(1, 2), k.transpose(1, 2), alpha=scale)
            weights = torch.softmax(scores, -1)
            del scores
            wide[:, part] = torch.bmm(weights, v).view(groups, full, -1, width)[:, :length]
            kept.append(weights.to(rows.dtype))
        tensors = [t.to(rows.dtype) for t in (query, key, value)]
        ctx.save_for_backward(rows, *turn, *tensors, *lows, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, cos, sin, *tensors = ctx.saved_tensors
        layers, placed, lengths, width, scale = ctx.layout
        dtype = layers[0].product_dtype
        query, key, value = (t.to(dtype) for t in tensors[:3])
        lows, kept = tensors[3 : 3 + len(placed)], tensors[3 + len(placed) :]
        wide = _grouped(grad, len(key), width)
        sizes = [len(key) * t[0, 0].numel() for t in (query, key, value)]
        grads = [query.new_empty(len(rows), size) for size in sizes]
        grad_query, grad_key = torch.empty_like(query), torch.empty_like(key)
        grad_value = _grouped(grads[2], len(key), width).squeeze(2)
        for (part, length), weights in zip(_segments(lengths), kept, strict=True):
            weights, full = weights.to(dtype), weights.shape[-1]
            q, k, v = (widen(t[:, part], full) for t in (query, key, value))
            q, g = q.flatten(1, 2), widen(wide[:, part].to(dtype), full).flatten(1, 2)
            grad_value[:, part] = torch.bmm(weights.transpose(1, 2), g)[:, :length]
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            scores: Any = torch._softmax_backward_data(grad_weights, weights, -1, dtype)
            del grad_weights
            found = torch.bmm(scores, k).view(len(key), full, -1, width)
            grad_query[:, part] = found[:, :length]
            grad_key[:, part] = torch.bmm(scores.transpose(1, 2), q)[:, :length]
        back = (cos * scale, sin * -scale)
        _grouped(grads[0], len(key), width).copy_(_turned(grad_query, *back))
        _grouped(grads[1], len(key), width).copy_(_turned(grad_key.unsqueeze(2), *back))
        grad_rows = back_project(
            layers, rows.to(dtype), placed, lows, grads, ctx.needs_input_grad[1]
        )
        own = None if grad_rows is None else grad_rows.to(grad.dtype)
        return None, own, None, None


def _grouped(rows: Tensor, groups: int, width: int) -> Tensor:
    """(tokens, heads * width) as (groups, tokens, heads of a group, width), a view."""
    return rows.view(len(rows), groups, -1, width).transpose(0, 1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads turned by their tokens' angles (Su et al. 2021); a contiguous copy.

    Shapes: x (groups, tokens, heads, width); cos and sin (tokens, 1, width / 2).
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin)
    return out


def _segments(lengths: tuple[int, ...]) -> Iterator[tuple[slice, int]]:
    start = 0
    for length in lengths:
        yield slice(start, start + length), length
        start += length
