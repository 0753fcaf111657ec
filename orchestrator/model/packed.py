"""One forward pass of the decoder over a packed row."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from orchestrator.model.base import Base


def hidden_states(base: Base, tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The decoder's last hidden states of a row.

    Args:
        base: the frozen base.
        tokens: (tokens,) int64 ids, segment after segment.
        lengths: the segments' lengths, summing to tokens.

    Returns:
        (tokens, hidden) in the base's dtype.
    """
    positions = _positions(lengths).to(tokens.device)
    output: Any = base.decoder(
        input_ids=tokens[None],
        position_ids=positions[None],
        use_cache=False,
        segment_lengths=lengths,
    )
    return output.last_hidden_state[0]


@lru_cache(maxsize=16)
def _positions(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])
