"""A step's examples laid out in packed rows. Pure arithmetic on arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data import Example
from orchestrator.data.batches import pack


@dataclass(frozen=True)
class Segment:
    """One example of one tenant; `key` names its place in training and decides its dropout."""

    tenant: int
    key: int
    example: Example


@dataclass(frozen=True)
class Row:
    """A packed row, ready to pass.

    Shapes: tokens (tokens,) int64; positions, targets and owners (targets,) int64, where
    positions point at the token before the target and owners at its tenant.
    spans: (tenant, start, stop), one for each tenant in the row.
    dropout_keys: (start, stop, key), one for each segment.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    positions: Tensor
    targets: Tensor
    owners: Tensor
    spans: tuple[tuple[int, int, int], ...]
    dropout_keys: tuple[tuple[int, int, int], ...]

    def to(self, device: torch.device) -> "Row":
        """The row with its tensors on a device."""
        moved = (t.to(device) for t in (self.tokens, self.positions, self.targets, self.owners))
        tokens, positions, targets, owners = moved
        return Row(tokens, self.lengths, positions, targets, owners, self.spans, self.dropout_keys)


def arrange(
    segments: Sequence[Segment], budget: int, short: int | None = None
) -> list[list[Segment]]:
    """Pack segments into rows of at most `budget` tokens; a row's tenants lie one after another.

    Args:
        segments: what is passed.
        budget: tokens of a row.
        short: where the base turns positions otherwise in longer rows, no segment of at most so
            many tokens shares a row with a longer one.
    """
    if short is not None:
        within = [s for s in segments if len(s.example.ids) <= short]
        beyond = [s for s in segments if len(s.example.ids) > short]
        return arrange(within, budget) + arrange(beyond, budget)
    packed = pack([len(segment.example.ids) for segment in segments], budget)
    rows = [[segments[index] for index in row] for row in packed]
    return [sorted(row, key=lambda s: (s.tenant, s.key)) for row in rows]


def build(segments: Sequence[Segment], length: int = 0) -> Row:
    """Concatenate segments into one row.

    Segments of no one's targets fill it up to `length`. None is longer than the longest example,
    by which a model may choose how it turns positions, and how many it has.
    """
    ids, positions, targets, owners = [], [], [], []
    spans: list[tuple[int, int, int]] = []
    keys, start = [], 0
    for segment in segments:
        example = segment.example
        stop = start + len(example.ids)
        chosen = _target_places(example)
        ids.append(example.ids)
        positions.append(chosen + (start - 1))
        targets.append(example.ids[chosen])
        owners.append(np.full(len(chosen), segment.tenant))
        keys.append((start, stop, segment.key))
        if spans and spans[-1][0] == segment.tenant:
            spans[-1] = (segment.tenant, spans[-1][1], stop)
        else:
            spans.append((segment.tenant, start, stop))
        start = stop
    longest = max(len(part) for part in ids)
    while start < length:
        stop = min(length, start + longest)
        # Whoever is last computes it: what nothing is predicted from has no gradient.
        ids.append(np.zeros(stop - start, dtype=np.int32))
        keys.append((start, stop, 0))
        spans[-1] = (*spans[-1][:2], stop)
        start = stop
    return Row(
        _tensor(ids),
        tuple(len(part) for part in ids),
        _tensor(positions),
        _tensor(targets),
        _tensor(owners),
        tuple(spans),
        tuple(keys),
    )


def _target_places(example: Example) -> NDArray[np.int64]:
    """Places of the tokens that are predicted; the first token has none before it."""
    places = np.flatnonzero(example.trained)
    return places[places > 0]


def _tensor(parts: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
