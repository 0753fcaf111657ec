"""What our engine puts into a model, for the meta device: allocations without arithmetic.

`orchestrator.model` holds the real ones, which this room must not know: LoraLinear (lora.py),
attention of packed rows (attention.py), cross entropy in chunks (loss.py). Each stand-in makes,
keeps and drops the same tensors in the same order; a test compares them with the real step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "orchestrator_planned"
# As in model/attention.py and model/loss.py.
DENSE_LIMIT = 512
LOGITS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Setting:
    """How the pass that is planned runs.

    rank, tenants, dropout: of the adapters; each tenant has an equal span of the row.
    double_quant: the quantization constants are dequantized before the weight.
    cuda: whether kernels of CUDA run instead of the CPU's.
    """

    rank: int
    tenants: int
    dropout: float
    double_quant: bool
    cuda: bool


def register() -> None:
    """Make the stand-in attention known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, planned_attention)


class PlannedLinear(nn.Module):
    """Stands for a `LoraLinear`, or for a quantized layer without adapters (`adapted` False)."""

    def __init__(self, base: nn.Module, quantized: bool, adapted: bool, setting: Setting) -> None:
        super().__init__()
        weight: Any = base.weight
        transposed = type(base).__name__ == "Conv1D"
        shape = tuple(weight.shape)
        self.out_features, self.in_features = shape[::-1] if transposed else shape
        self.dense = None if quantized else (weight.t() if transposed else weight)
        bias: Any = base.bias
        self.bias, self.dtype = bias, weight.dtype
        self.setting, self.adapted = setting, adapted
        self.anchor = torch.zeros((), device="meta", requires_grad=True)

    def weight_now(self) -> Tensor:
        """The weight (out, in), dequantized as bitsandbytes does it."""
        if self.dense is not None:
            return self.dense
        count = self.out_features * self.in_features
        if self.setting.double_quant:
            # The float32 constants, one for 64 weights, live while the weight is written.
            constants = torch.empty(-(-count // 64), dtype=torch.float32, device="meta")
        weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        if self.setting.double_quant:
            del constants
        return weight

    def spans(self, tokens: int) -> list[tuple[int, int]]:
        """Each tenant's (start, stop) in a row."""
        if not self.adapted:
            return []
        tenants = self.setting.tenants
        bounds = [tokens * place // tenants for place in range(tenants + 1)]
        return list(pairwise(bounds))

    def forward(self, x: Tensor) -> Tensor:
        """The product with its low-rank parts."""
        rows = x.reshape(-1, x.shape[-1])
        function: Any = _Product.apply
        return function(self.anchor, rows, self).view(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, layer: PlannedLinear) -> Tensor:
        weight, rank = layer.weight_now(), layer.setting.rank
        out = rows @ weight.t() if layer.bias is None else torch.addmm(layer.bias, rows, weight.t())
        lows = []
        for start, stop in layer.spans(len(rows)):
            inputs = rows[start:stop]
            if layer.setting.dropout:
                inputs = inputs * torch.empty_like(inputs)
            low = inputs.new_empty(stop - start, rank)
            lows.append(low)
        ctx.save_for_backward(rows if lows else None, *lows)
        ctx.layer, ctx.tokens = layer, len(rows)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *_ = ctx.saved_tensors
        layer: PlannedLinear = ctx.layer
        rank, dropout = layer.setting.rank, layer.setting.dropout
        grad_rows = grad @ layer.weight_now() if ctx.needs_input_grad[1] else None
        for start, stop in layer.spans(ctx.tokens):
            inputs = rows[start:stop]
            grad_b = grad.new_empty(rank, layer.out_features)
            del grad_b
            grad_low = grad.new_empty(stop - start, rank)
            mask = torch.empty_like(inputs) if dropout else None
            masked = inputs if mask is None else inputs * mask
            grad_a = grad_low.t() @ masked
            del masked, grad_a
            if grad_rows is not None and mask is not None:
                grad_rows[start:stop].add_(inputs.new_empty(inputs.shape).mul_(mask))
        return None, grad_rows, None


def planned_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segment_lengths: tuple[int, ...] | None = None,
    planned_for_cuda: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `segmented_attention`: the same choice among the same four ways."""
    lengths = segment_lengths or (query.shape[2],)
    longest = max(lengths)
    window = None if sliding_window is None or sliding_window >= longest else sliding_window
    function: Any
    if softcap is not None or (window is not None and not planned_for_cuda):
        return _masked(query, key, value, lengths, window, softcap), None
    if planned_for_cuda:
        function = _Flash
    elif longest <= DENSE_LIMIT:
        function = _DenseSegments
    else:
        return _by_segment(query, key, value, lengths), None
    return function.apply(query[0], key[0], value[0], lengths)[None], None


def _by_segment(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    parts = [flash(q, k, v, 0.0, True)[0] for q, k, v in _split(query, key, value, lengths)]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    window: int | None,
    softcap: float | None,
) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in _split(query, key, value, lengths):
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        scores = (q @ k.transpose(2, 3)).float() * 1.0
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(q.shape[2], device="meta")
        distance = position[:, None] - position[None, :]
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(q.dtype)
        outputs.append(weights @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _split(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    sizes = list(lengths)
    return zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)


class _Flash(torch.autograd.Function):
    """torch's variable-length kernel: keeps its inputs, its output, and a float32 a row and head.

    FlashAttention-2 (arXiv 2307.08691, section 3.1); its backward pass accumulates the query's
    gradient in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        heads, tokens, _ = query.shape
        q, k, v = (t.transpose(0, 1).contiguous() for t in (query, key, value))
        output = query.new_empty(tokens, heads, value.shape[-1])
        sums = query.new_empty(heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, sums = ctx.saved_tensors
        accumulated = torch.empty_like(query, dtype=torch.float32)
        repeated = [t.new_empty(query.shape[:2] + t.shape[2:]) for t in (key, value)]
        grads = [torch.empty_like(t).transpose(0, 1) for t in (query, key, value)]
        del accumulated, repeated, sums
        return (*grads, None)


class _DenseSegments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        heads, tokens, width = query.shape
        groups = key.shape[0]
        output = query.new_empty(tokens, heads, value.shape[-1])
        kept, start = [], 0
        for length in lengths:
            part = slice(start, start + length)
            q, k, v = query[:, part].reshape(groups, -1, width), key[:, part], value[:, part]
            scores = torch.bmm(q, k.transpose(1, 2)).view(heads, length, length).float()
            weights = torch.softmax(scores, -1).to(query.dtype).view(groups, -1, length)
            output[part] = torch.bmm(weights, v).view(heads, length, -1).transpose(0, 1)
            kept.append(weights)
            start += length
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths = lengths
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        groups = key.shape[0]
        grads = [torch.empty_like(t) for t in (query, key, value)]
        start = 0
        for length, weights in zip(ctx.lengths, kept, strict=True):
            part = slice(start, start + length)
            q = query[:, part].reshape(groups, -1, query.shape[-1])
            k, v = key[:, part], value[:, part]
            g = grad[part].transpose(0, 1).reshape(groups, -1, value.shape[-1])
            grad_value = torch.bmm(weights.transpose(1, 2), g)
            grad_weights = torch.bmm(g, v.transpose(1, 2)).float()
            wide = weights.float()
            grad_scores = torch.empty_like(grad_weights)
            del wide
            grad_scores = grad_scores.to(query.dtype)
            grad_query = torch.bmm(grad_scores, k)
            grad_key = torch.bmm(grad_scores.transpose(1, 2), q)
            start += length
        del grad_query, grad_key, grad_value
        return (*grads, None)


def planned_loss(hidden: Tensor, weight: Tensor, softcap: float | None, scale: float) -> Tensor:
    """As `token_losses` with a target at every token: the scalar that is differentiated."""
    function: Any = _ChunkedCrossEntropy.apply
    return function(hidden, weight, softcap, scale)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, softcap: float | None, scale: float
    ) -> Tensor:
        grad = torch.empty_like(hidden)
        size = max(16, LOGITS_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            grad[part] = _chunk(hidden[part], weight, softcap, scale)
        ctx.save_for_backward(grad)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_sum.to(grad.dtype), None, None, None


def _chunk(hidden: Tensor, weight: Tensor, softcap: float | None, scale: float) -> Tensor:
    logits = hidden @ weight.t()
    scores = logits.float()
    if scale != 1.0:
        scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    del logits
    grad = torch.softmax(scores, 1)
    if softcap is not None:
        grad.mul_(1 - (scores / softcap).square())
    return grad.to(hidden.dtype) @ weight
