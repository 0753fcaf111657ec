"""On a CPU: what a row of a new length compiles is compiled while the row holds nothing yet.

oneDNN compiles each bfloat16 product anew for each number of tokens and keeps the code on the heap.
Compiled in the midst of a pass it comes to lie between activations, and once those are freed no
block of the next pass fits between: a wide, shallow model took 2.6 GiB instead of 2.3.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from orchestrator.lengths import CHUNK_STEP, segment_length
from orchestrator.model.loss import Head, token_losses
from orchestrator.model.products import product_dtype

# Shape of the head, tokens of a chunk, threads: of what this process has compiled.
_chunks: set[tuple[torch.Size, int, int]] = set()


def compile_early(model: Any) -> None:
    """Let the first layer of each kind pass a row of a new length twice, to train.

    Args:
        model: a base with its adapters' layers; nothing changes where no product is compiled.
    """
    weight = model.get_output_embeddings().weight
    if weight.device.type != "cpu" or product_dtype(weight.dtype, weight.device) != torch.bfloat16:
        return
    for layer in _first_of_each_kind(model):
        layer.register_forward_pre_hook(_Rehearsal(), with_kwargs=True)


def compile_loss(head: Head, targets: int) -> None:
    """Compute a made-up loss of so many targets where chunks of such a size are new.

    Args:
        head: the output head.
        targets: of the row that is passed next.
    """
    if not head.compiles:
        return
    chunk, threads = head.chunk(), torch.get_num_threads()
    for tokens in filter(None, (min(targets, chunk), targets % chunk)):
        size = min(chunk, -(-tokens // CHUNK_STEP) * CHUNK_STEP)
        key = head.weight.shape, size, threads
        if key not in _chunks:
            _chunks.add(key)
            hidden = head.weight.new_zeros(size, head.weight.shape[1]).requires_grad_()
            token_losses(hidden, head, torch.zeros(size, dtype=torch.long), torch.ones(size))


def _first_of_each_kind(model: Any) -> Iterator[nn.Module]:
    config = model.config.get_text_config()
    lists = (m for m in model.base_model.modules() if isinstance(m, nn.ModuleList))
    layers = next((m for m in lists if len(m) == config.num_hidden_layers), ())
    met = set()
    for layer, kind in zip(layers, getattr(config, "layer_types", None) or layers, strict=False):
        kind = kind if isinstance(kind, str) else type(layer)
        if kind not in met:
            met.add(kind)
            yield layer


class _Rehearsal:
    """Of one layer, before its own pass; by then the row holds its embeddings only."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths = kwargs.get("segment_lengths")
        if lengths is None or not args or not torch.is_grad_enabled():
            # Generation, or a pass that keeps nothing.
            return
        threads = torch.get_num_threads()
        sizes = {sum(lengths), *map(segment_length, lengths)}
        new = {(size, threads) for size in sizes} - self._seen
        if not new:
            return
        self._seen |= new
        # Where layers are recomputed, what is saved here is none of theirs.
        with saved_tensors_hooks(_same, _same):
            hidden = args[0].detach().requires_grad_()
            found = layer.forward(hidden, *args[1:], **kwargs)
            out = found if isinstance(found, Tensor) else found[0]
            # Of a gradient of zeros the adapters' stay as they are.
            torch.autograd.grad(out, hidden, torch.zeros_like(out))


def _same(tensor: Tensor) -> Tensor:
    return tensor
