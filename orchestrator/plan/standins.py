"""What our engine puts into a model, for the meta device: allocations without arithmetic.

`orchestrator.model` holds the real ones, which this room must not know: LoraLinear (lora.py),
attention of packed rows (attention.py), cross entropy in chunks (loss.py). Each stand-in makes,
keeps and drops the same tensors in the same order; a test compares them with the real step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.lengths import (
    DENSE_LIMIT,
    block_length,
    chunk_length,
    segment_length,
    slice_length,
)

ATTENTION = "orchestrator_planned"


@dataclass(frozen=True)
class Setting:
    """How the pass that is planned runs.

    rank, tenants, dropout: of the adapters; each tenant has an equal span of the row.
    double_quant: the quantization constants are dequantized before the weight.
    cuda: whether kernels of CUDA run instead of the CPU's. products: dtype of the products.
    """

    rank: int
    tenants: int
    dropout: float
    double_quant: bool
    cuda: bool
    products: torch.dtype


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
            return self.dense.to(self.setting.products)
        count = self.out_features * self.in_features
        if self.setting.double_quant:
            # The float32 constants, one for 64 weights, live while the weight is written.
            constants = torch.empty(-(-count // 64), dtype=torch.float32, device="meta")
        weight = torch.empty(
            self.out_features, self.in_features, dtype=self.setting.products, device="meta"
        )
        if self.setting.double_quant:
            del constants
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """The product with its low-rank parts."""
        rows = x.reshape(-1, x.shape[-1])
        function: Any = _Product.apply
        return function(self.anchor, rows, self).view(*x.shape[:-1], self.out_features)


def project(layers: Sequence[PlannedLinear], rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """As `model.lora.project`: outputs, and each part's low-rank input."""
    outs = []
    for layer in layers:
        weight, bias = layer.weight_now(), layer.bias
        plain = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        outs.append(plain)
        del weight
    lows = []
    for members, start, stop in _parts(layers, len(rows)):
        inputs = rows[start:stop]
        if layers[0].setting.dropout:
            inputs = inputs * torch.empty_like(inputs)
        a = _stacked(layers, members)
        lows.append(inputs.new_empty(stop - start, members * layers[0].setting.rank))
        del a
    return outs, lows


def back_project(
    layers: Sequence[PlannedLinear],
    rows: Tensor | None,
    lows: Sequence[Tensor],
    grads: Sequence[Tensor],
    needs_input: bool = True,
) -> Tensor | None:
    """As `model.lora.back_project`."""
    rank, dropout = layers[0].setting.rank, layers[0].setting.dropout
    grad_rows = None
    if needs_input:
        grad_rows = grads[0] @ layers[0].weight_now()
        for layer, grad in zip(layers[1:], grads[1:], strict=True):
            grad_rows.addmm_(grad, layer.weight_now())
    if rows is None:
        return grad_rows
    wide = rows.dtype == torch.float32
    for (members, start, stop), low in zip(_parts(layers, len(rows)), lows, strict=True):
        inputs, grad_low = rows[start:stop], torch.empty_like(low)
        if not wide:
            grad_b = low.new_empty(rank, layers[-1].out_features)
            del grad_b
        mask = torch.empty_like(inputs) if dropout else None
        masked = inputs if mask is None else inputs * mask
        if members > 1 or not wide:
            grad_a = grad_low.t() @ masked
            del grad_a
        a = _stacked(layers, members)
        if grad_rows is not None and mask is not None:
            grad_rows[start:stop].add_(inputs.new_empty(inputs.shape).mul_(mask))
        del masked, a
    return grad_rows


def _parts(layers: Sequence[PlannedLinear], tokens: int) -> list[tuple[int, int, int]]:
    """(layers that are passed together, start, stop) of each tenant in a row."""
    adapted, setting = sum(layer.adapted for layer in layers), layers[0].setting
    bounds = [tokens * place // setting.tenants for place in range(setting.tenants + 1)]
    groups = [1] * adapted if setting.dropout else [adapted] * (adapted > 0)
    return [(members, *span) for span in pairwise(bounds) for members in groups]


def _stacked(layers: Sequence[PlannedLinear], members: int) -> Tensor | None:
    """The copy in which the A matrices of several layers are one."""
    setting = layers[0].setting
    size = (members * setting.rank, layers[0].in_features)
    return torch.empty(size, dtype=setting.products, device="meta") if members > 1 else None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, layer: PlannedLinear) -> Tensor:
        (out,), lows = project((layer,), rows.to(layer.setting.products))
        ctx.save_for_backward(rows if lows else None, *lows)
        ctx.layer = layer
        return out.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *lows = ctx.saved_tensors
        layer: PlannedLinear = ctx.layer
        products = layer.setting.products
        wide = None if rows is None else rows.to(products)
        grads = [grad.to(products)]
        grad_rows = back_project((layer,), wide, lows, grads, ctx.needs_input_grad[1])
        return None, None if grad_rows is None else grad_rows.to(grad.dtype), None


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
    planned_varlen: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `segmented_attention`: the same choice among the same four ways."""
    varlen = planned_varlen and _takes_varlen(query, value)
    lengths = segment_lengths or (query.shape[2],)
    longest = max(lengths)
    window = None if sliding_window is None or sliding_window >= longest else sliding_window
    function: Any
    if softcap is not None or (window is not None and not varlen):
        wide = not planned_for_cuda
        return _masked(query, key, value, lengths, window, softcap, wide), None
    if varlen:
        function = _Flash
    elif not planned_for_cuda and longest <= DENSE_LIMIT:
        function = _DenseSegments
    else:
        return _by_segment(query, key, value, lengths, planned_for_cuda), None
    return function.apply(query[0], key[0], value[0], lengths)[None], None


def _takes_varlen(query: Tensor, value: Tensor) -> bool:
    """As `_has_varlen`, but for the GPU itself."""
    width = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and width == value.shape[-1] and width <= 256 and width % 8 == 0


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], cuda: bool
) -> Tensor:
    kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    options: dict[str, Any] = {"is_causal": True}
    if cuda:
        repeat = query.shape[1] // key.shape[1]
        if repeat > 1:
            key, value = (t.repeat_interleave(repeat, dim=1) for t in (key, value))
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        options |= {"attn_bias": None, "compute_log_sumexp": True}
    parts = [kernel(q, k, v, **options)[0] for q, k, v in _split(query, key, value, lengths)]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    window: int | None,
    softcap: float | None,
    wide: bool,
) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in _split(query, key, value, lengths):
        tokens = q.shape[2]
        if wide:
            q, k, v = (widen(t[0], segment_length(tokens))[None] for t in (q, k, v))
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        scores = (q @ k.transpose(2, 3)).float() * 1.0
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(q.shape[2], device="meta")
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


class _Flash(torch.autograd.Function):
    """torch's variable-length kernel: keeps its inputs, its output, and a float32 a row and head.

    FlashAttention-2 (arXiv 2307.08691, section 3.1); its backward pass accumulates the query's
    gradient in float32, with 128 rows to spare after each segment (torch's flash_api.cpp,
    mha_varlen_bwd).
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
        ctx.rows = tokens + 128 * len(lengths)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, sums = ctx.saved_tensors
        _, heads, width = query.shape
        multiple = 32 if width <= 128 else 64
        width = -(-width // multiple) * multiple
        accumulated = sums.new_empty(ctx.rows, heads, width)
        dots = sums.new_empty(heads, ctx.rows)
        # Key heads that serve several query heads have a gradient of each.
        shared = heads != key.shape[1]
        repeated = [t.new_empty(query.shape) for t in (key, value) if shared]
        grads = [torch.empty_like(t).transpose(0, 1) for t in (query, key, value)]
        del accumulated, dots, repeated, sums
        return (*grads, None)


def widen(part: Tensor, length: int) -> Tensor:
    """As `model.attention.widen`."""
    extra = length - part.shape[1]
    return F.pad(part, (*(0, 0) * (part.dim() - 2), 0, extra)) if extra else part


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
            part, full = slice(start, start + length), segment_length(length)
            q = widen(query[:, part], full).reshape(groups, -1, width)
            k, v = widen(key[:, part], full), widen(value[:, part], full)
            hidden = q.new_empty(1, full * heads // groups, full).expand(groups, -1, -1)
            scores = torch.baddbmm(hidden, q, k.transpose(1, 2))
            weights = torch.softmax(scores, -1)
            found = torch.bmm(weights, v).view(heads, full, -1)
            output[part] = found[:, :length].transpose(0, 1)
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
            part, full = slice(start, start + length), weights.shape[-1]
            q = widen(query[:, part], full).reshape(groups, -1, query.shape[-1])
            k, v = widen(key[:, part], full), widen(value[:, part], full)
            g = widen(grad[part].transpose(0, 1), full).reshape(groups, -1, value.shape[-1])
            grad_value = torch.bmm(weights.transpose(1, 2), g)
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            grad_scores = torch.empty_like(grad_weights)
            grad_query = torch.bmm(grad_scores, k)
            grad_key = torch.bmm(grad_scores.transpose(1, 2), q)
            start += length
        del grad_query, grad_key, grad_value
        return (*grads, None)


def planned_loss(
    hidden: Tensor,
    weight: Tensor,
    softcap: float | None,
    scale: float,
    products: torch.dtype,
    cuda: bool,
) -> Tensor:
    """As `token_losses` with a target at every token: the scalar that is differentiated."""
    function: Any = _ChunkedCrossEntropy.apply
    vocabulary = weight.shape[0]
    chunk = chunk_length(vocabulary, filled=cuda or products == torch.bfloat16)
    block = chunk if cuda else block_length(vocabulary)
    return function(hidden, weight, softcap, scale, products, chunk, block)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        softcap: float | None,
        scale: float,
        products: torch.dtype,
        chunk: int,
        block: int,
    ) -> Tensor:
        grad = torch.empty_like(hidden)
        # Two chunks hold what a hundred hold.
        for start in range(0, min(len(hidden), 2 * chunk), chunk):
            part = slice(start, start + chunk)
            grad[part] = _chunk(hidden[part], weight, softcap, scale, products, block)
        ctx.save_for_backward(grad)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_sum.to(grad.dtype), None, None, None, None, None, None


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    softcap: float | None,
    scale: float,
    products: torch.dtype,
    block: int,
) -> Tensor:
    wide = hidden.to(products)
    logits = wide.new_empty(len(hidden), weight.shape[0])
    own = _slice(weight, products)
    torch.mm(wide, own.t(), out=logits[:, : len(own)])
    del own, wide
    # Two blocks hold what a hundred hold.
    for start in range(0, min(len(hidden), 2 * block), block):
        scores = logits[start : start + block].float()
        if scale != 1.0:
            scores = scores * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        grad = torch.softmax(scores, 1)
        if softcap is not None:
            grad.mul_(1 - (scores / softcap).square())
        del scores, grad
    total = logits.new_zeros(len(hidden), weight.shape[1])
    own = _slice(weight, products)
    total.addmm_(logits[:, : len(own)], own)
    gradient = total.float()
    del own, total
    return gradient * scale


def _slice(weight: Tensor, products: torch.dtype) -> Tensor:
    """The block that all slices of the head's weight share."""
    if products == weight.dtype:
        return weight
    size = slice_length(len(weight), weight.shape[1], products.itemsize)
    return weight.new_empty(size, weight.shape[1], dtype=products)
