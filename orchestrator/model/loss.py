"""Cross entropy at the targets only, in chunks.

The output head is frozen, so the gradient of the hidden states is computed in the forward pass,
chunk by chunk, and the logits of a whole row never exist. Of a chunk's logits some rows at a time
become float32 scores, and are overwritten by their gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.lengths import (
    LOGITS_BYTES,
    block_length,
    chunk_length,
    filled_chunk,
    slice_length,
)
from orchestrator.model.products import add_product, compiles, product_dtype


@dataclass(frozen=True)
class Head:
    """The frozen output head: weight (vocabulary, hidden), bias (vocabulary,) or None.

    softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.
    scale: factor on the logits, as in Cohere and Granite.
    logits_bytes: bytes of logits that may exist at a time, as float32.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    logits_bytes: int = LOGITS_BYTES

    def chunk(self) -> int:
        """Tokens whose logits are computed together."""
        filled = self.weight.is_cuda or self.compiles
        return chunk_length(self.weight.shape[0], filled, self.logits_bytes)

    def block(self) -> int:
        """Tokens of a chunk whose scores exist at a time."""
        return self.chunk() if self.weight.is_cuda else block_length(self.weight.shape[0])

    @property
    def compiles(self) -> bool:
        """Whether a product is compiled for each number of tokens."""
        return compiles(self.weight)

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype in which the head multiplies."""
        return product_dtype(self.weight.dtype, self.weight.device)

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the products' dtype; some rows at a time where it is kept in another.

        Each slice is overwritten by the next: they share one block, for eight that are freed alone
        leave holes in the heap that none of the next eight fits into.
        """
        if self.product_dtype == self.weight.dtype:
            yield slice(None), self.weight
            return
        vocabulary, hidden = self.weight.shape
        size = slice_length(vocabulary, hidden, self.product_dtype.itemsize)
        room = self.weight.new_empty(size, hidden, dtype=self.product_dtype)
        for start in range(0, vocabulary, size):
            rows = self.weight[start : start + size]
            yield slice(start, start + size), room[: len(rows)].copy_(rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, vocabulary) in the products' dtype for hidden states of (tokens, hidden)."""
        wide = hidden.to(self.product_dtype)
        logits = wide.new_empty(len(hidden), self.weight.shape[0])
        for part, weight in self.slices():
            torch.mm(wide, weight.t(), out=logits[:, part])
        if self.bias is not None:
            logits += self.bias
        return logits

    def scores(self, logits: Tensor) -> Tensor:
        """Float32 scores of some tokens' logits."""
        scores = logits.float()
        if self.scale != 1.0:
            scores = scores * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores

    def gradient(self, grad: Tensor) -> Tensor:
        """Float32 (tokens, hidden) for the gradient of the logits, (tokens, vocabulary)."""
        total = grad.new_zeros(len(grad), self.weight.shape[1])
        for part, weight in self.slices():
            add_product(total, grad[:, part], weight)
        return total.float()


def token_losses(
    hidden: Tensor, head: Head, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each target token.

    Args:
        hidden: (targets, hidden) states from which the targets are predicted.
        head: the output head.
        targets: (targets,) int64 token ids.
        weights: (targets,) float32 factor of each token's loss in the sum that is differentiated.

    Returns:
        The weighted sum (a scalar that can be differentiated), and the losses, float32 (targets,).
    """
    function: Any = _ChunkedCrossEntropy.apply
    return function(hidden, head, targets, weights)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad[0]
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if needs_grad else None
        size = head.chunk()
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            states, wanted, chosen = hidden[part], targets[part], weights[part]
            if head.compiles:
                states, wanted, chosen = (_filled(t, size) for t in (states, wanted, chosen))
            found, grad_part = _chunk(states, head, wanted, chosen if needs_grad else None)
            losses[part] = found[: len(targets) - start]
            if grad is not None and grad_part is not None:
                grad[part] = grad_part[: len(targets) - start]
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (None if grad is None else grad * grad_sum.to(grad.dtype)), None, None, None


def _filled(rows: Tensor, chunk: int) -> Tensor:
    """With zeros up to some numbers of tokens."""
    extra = filled_chunk(len(rows), chunk) - len(rows)
    return F.pad(rows, (*(0, 0) * (rows.dim() - 1), 0, extra)) if extra else rows


def _chunk(
    hidden: Tensor, head: Head, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    logits, size = head.logits(hidden), head.block()
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        losses[part] = _block(logits[part], head, targets[part], weights is not None)
    if weights is None:
        return losses, None
    return losses, head.gradient(logits) * (head.scale * weights[:, None])


def _block(logits: Tensor, head: Head, targets: Tensor, needs_grad: bool) -> Tensor:
    """The losses; `logits` become their own gradient where that is needed."""
    scores, index = head.scores(logits), targets[:, None]
    chosen = scores.gather(1, index).squeeze(1)
    if not needs_grad:
        return torch.logsumexp(scores, 1) - chosen
    probabilities = torch.softmax(scores, 1)
    # The largest probability is never tiny, so the normalizer is exact where it is read.
    normalizer = scores.amax(1) - probabilities.amax(1).log()
    grad = probabilities.scatter_add_(1, index, torch.full_like(chosen, -1)[:, None])
    if head.softcap is not None:
        grad.mul_(1 - (scores / head.softcap).square())
    logits.copy_(grad)
    return normalizer - chosen
