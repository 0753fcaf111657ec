"""Attention of packed rows: every segment (one example) attends within itself only.

Registered with transformers under `SEGMENTED`; the model then builds no mask at all and hands the
keyword `segment_lengths` of its forward pass down to the attention function.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.errors import ModelError
from orchestrator.lengths import DENSE_LIMIT, segment_length

SEGMENTED = "orchestrator_segmented"


def register() -> None:
    """Make `SEGMENTED` known to transformers as an attention implementation."""
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENTED, segmented_attention)


def segmented_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segment_lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of one packed row.

    Args:
        module: the attention layer, for error messages.
        query: (1, heads, tokens, head_dim).
        key: (1, key_value_heads, tokens, head_dim).
        value: (1, key_value_heads, tokens, value_dim).
        attention_mask: ignored; segments say all there is to say.
        scaling: factor on the scores; 1/sqrt(head_dim) when None.
        sliding_window: a token sees this many tokens, itself included.
        softcap: scores become softcap * tanh(scores / softcap).
        segment_lengths: tokens of each segment, summing to the row's; one segment when None.
        options: what else the model passes; sinks and position biases are refused.

    Returns:
        Output of shape (1, tokens, heads, value_dim), and None for the weights.

    Raises:
        ModelError: the model asks for a form of attention that is not built here.
    """
    lengths = segment_lengths or (query.shape[2],)
    for name in ("s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ModelError(f"{type(module).__name__} uses {name} in its attention; not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    longest = max(lengths)
    window = None if sliding_window is None or sliding_window >= longest else sliding_window
    varlen = _has_varlen(query, value)
    if softcap is not None or (window is not None and not varlen):
        out = _masked(query, key, value, lengths, scale, window, softcap)
    elif varlen:
        out = _varlen(query, key, value, lengths, scale, window)
    elif query.device.type == "cpu" and longest <= DENSE_LIMIT and torch.is_grad_enabled():
        dense: Any = _DenseSegments.apply
        out = dense(query[0], key[0], value[0], lengths, scale)[None]
    else:
        out = _by_segment(query, key, value, lengths, scale)
    return out, None


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """Torch's own kernels, which keep no scores.

    On a CPU their forward pass takes a third of the time of `_DenseSegments`', their backward pass
    three times as long where segments are short.
    """
    gqa = query.shape[1] != key.shape[1]
    if gqa and query.is_cuda:
        # The kernel that keeps no scores takes one key head for each query head only.
        repeat = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeat, dim=1) for t in (key, value))
        gqa = False
    parts = []
    for q, k, v in _split(query, key, value, lengths):
        tokens = q.shape[2]
        if q.device.type == "cpu" and not torch.is_grad_enabled():
            # Else it is compiled for each length; a backward pass would keep what was filled.
            q, k, v = _filled(q, k, v)
        part = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
        parts.append(part[:, :, :tokens])
    return torch.cat(parts, dim=2).transpose(1, 2)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention spelled out, for soft-capped scores and for windows shorter than a segment."""
    repeat = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in _split(query, key, value, lengths):
        tokens = q.shape[2]
        if q.device.type == "cpu":
            q, k, v = _filled(q, k, v)
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        scores = (q @ k.transpose(2, 3)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        length = q.shape[2]
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position[None, :]
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(q.dtype)
        outputs.append((weights @ v)[:, :, :tokens])
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _split(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    sizes = list(lengths)
    return zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)


def _filled(*parts: Tensor) -> Iterator[Tensor]:
    """A segment's (1, heads, tokens, d) with zeros after it, up to one of few lengths."""
    return (widen(part[0], segment_length(part.shape[2]))[None] for part in parts)


def _has_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether torch's variable-length flash attention takes these tensors."""
    return (
        query.is_cuda
        and query.shape[-1] == value.shape[-1]
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and _varlen_device(query.device.index)
    )


@lru_cache
def _varlen_device(index: int) -> bool:
    from importlib.util import find_spec

    known = find_spec("torch.nn.attention.varlen") is not None
    return known and torch.cuda.get_device_capability(index) >= (8, 0)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = _bounds(lengths, query.device)
    longest = max(lengths)
    out: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        bounds,
        bounds,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None]


@lru_cache(maxsize=8)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device)


def future(length: int, heads: int, dtype: torch.dtype) -> Tensor:
    """On the CPU (length * heads, length): -inf where a token, of so many rows, would see later."""
    return _future(heads, dtype)[: length * heads, :length]


@lru_cache(maxsize=4)
def _future(heads: int, dtype: torch.dtype) -> Tensor:
    full = torch.full((DENSE_LIMIT, DENSE_LIMIT), float("-inf"), dtype=dtype).triu(1)
    return full.repeat_interleave(heads, 0)


def widen(part: Tensor, length: int) -> Tensor:
    """A (heads, tokens, ...) segment with zeros after it: no token sees what comes later."""
    extra = length - part.shape[1]
    return F.pad(part, (*(0, 0) * (part.dim() - 2), 0, extra)) if extra else part


class _DenseSegments(torch.autograd.Function):
    """Softmax attention segment by segment with the probabilities kept for the backward pass.

    Shapes: query (heads, tokens, d), key and value (key_value_heads, tokens, d); the output is
    (tokens, heads, d). Query heads that share a key head are one batch of its matrix products.
    Scale and mask are part of the scores' product; softmax computes in float32 inside.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        heads, tokens, _ = query.shape
        groups = key.shape[0]
        output = query.new_empty(tokens, heads, value.shape[-1])
        kept, start = [], 0
        for length in lengths:
            part, wide = slice(start, start + length), segment_length(length)
            q = widen(query[:, part], wide).reshape(groups, -1, query.shape[-1])
            k, v = widen(key[:, part], wide), widen(value[:, part], wide)
            hidden = future(wide, 1, query.dtype).repeat(heads // groups, 1)
            scores = torch.baddbmm(hidden.expand(groups, -1, -1), q, k.transpose(1, 2), alpha=scale)
            weights = torch.softmax(scores, -1)
            found = torch.bmm(weights, v).view(heads, wide, -1)
            output[part] = found[:, :length].transpose(0, 1)
            kept.append(weights)
            start += length
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        heads, groups = query.shape[0], key.shape[0]
        grad_query, grad_key, grad_value = (torch.empty_like(t) for t in (query, key, value))
        start = 0
        for length, weights in zip(ctx.lengths, kept, strict=True):
            part, wide = slice(start, start + length), weights.shape[-1]
            q = widen(query[:, part], wide).reshape(groups, -1, query.shape[-1])
            k, v = widen(key[:, part], wide), widen(value[:, part], wide)
            g = widen(grad[part].transpose(0, 1), wide).reshape(groups, -1, value.shape[-1])
            grad_value[:, part] = torch.bmm(weights.transpose(1, 2), g)[:, :length]
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_scores = grad_scores.mul_(ctx.scale)
            grad_query[:, part] = torch.bmm(grad_scores, k).view(heads, wide, -1)[:, :length]
            grad_key[:, part] = torch.bmm(grad_scores.transpose(1, 2), q)[:, :length]
            start += length
        return grad_query, grad_key, grad_value, None, None
