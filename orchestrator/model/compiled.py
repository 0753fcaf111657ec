"""On a CPU: what a row of a new length compiles is compiled while the row holds little yet.

oneDNN compiles each bfloat16 product anew for each number of tokens and keeps much of it on the
heap. Compiled in the midst of a pass it comes to lie between activations, and once those are freed
no block of the next pass fits between: a wide, shallow model took 2.6 GiB instead of 2.3.

Not covered, at the price of such gaps: passes without gradients, which keep nothing; spans of
several tenants in one row; experts of a mixture that a token does not choose.
"""

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from orchestrator.lengths import filled_chunk, segment_length
from orchestrator.model.lora import LoraLinear
from orchestrator.model.loss import Head, token_losses
from orchestrator.model.products import compiles

# Shape of the head, tokens of a chunk, threads: of what this process has compiled.
_chunks: set[tuple[torch.Size, int, int]] = set()


def compile_early(model: Any) -> None:
    """Let the first layer of each kind rehearse rows of new lengths before it trains on them.

    Args:
        model: a base with its adapters' layers; nothing changes where no product is compiled.
    """
    if not compiles(model.get_output_embeddings().weight):
        return
    for layer in _first_of_each_kind(model):
        layer.register_forward_pre_hook(_Rehearsal(), with_kwargs=True)


def compile_loss(head: Head, targets: int) -> None:
    """Compute the loss of a made-up chunk of each size that is new.

    Args:
        head: the output head.
        targets: of the row that is passed next.
    """
    if not head.compiles:
        return
    chunk, threads = head.chunk(), torch.get_num_threads()
    for tokens in filter(None, (min(targets, chunk), targets % chunk)):
        size = filled_chunk(tokens, chunk)
        key = head.weight.shape, size, threads
        if key not in _chunks:
            hidden = head.weight.new_zeros(size, head.weight.shape[1]).requires_grad_()
            token_losses(hidden, head, torch.zeros(size, dtype=torch.long), torch.ones(size))
            _chunks.add(key)


def _first_of_each_kind(model: Any) -> Iterator[nn.Module]:
    config = model.config.get_text_config()
    lists = (m for m in model.base_model.modules() if isinstance(m, nn.ModuleList))
    layers: Any = next((m for m in lists if len(m) == config.num_hidden_layers), ())
    kinds = getattr(config, "layer_types", None) or [""] * len(layers)
    met = set()
    for layer, named in zip(layers, kinds, strict=False):
        # One class has dense layers and mixtures of experts.
        kind = named, repr(layer)
        if kind not in met:
            met.add(kind)
            yield layer


class _Rehearsal:
    """Of one layer: before its own pass of a row of a new length, one of which nothing is kept."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths = kwargs.get("segment_lengths")
        if lengths is None or not args or not torch.is_grad_enabled():
            # Generation, or a pass that keeps nothing.
            return
        threads = torch.get_num_threads()
        sizes: set[Hashable] = {("row", sum(lengths), threads, _ranks(layer))}
        sizes.update(("segment", segment_length(length), threads) for length in lengths)
        if sizes <= self._seen:
            return
        row = args[0].detach().requires_grad_()
        # Hooks of who saves or recomputes the real pass are not for this one.
        with saved_tensors_hooks(Tensor.detach, _same):
            # A copy: a layer may change its input in place.
            found = layer.forward(row.clone(), *args[1:], **kwargs)
            out = found if isinstance(found, Tensor) else found[0]
            # Of a gradient of zeros the adapters' stay as they are.
            torch.autograd.grad(out, row, torch.zeros_like(out))
        self._seen |= sizes


def _ranks(layer: nn.Module) -> tuple[int, ...]:
    """Ranks of the adapters that have a part in a layer's next pass."""
    adapted = next((m for m in layer.modules() if isinstance(m, LoraLinear)), None)
    if adapted is None:
        return ()
    owners = (owner for owner, *_ in adapted.placement.spans)
    return tuple(adapted.slots[owner].a.shape[0] for owner in owners if owner in adapted.slots)


def _same(tensor: Tensor) -> Tensor:
    return tensor
