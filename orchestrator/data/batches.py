"""Which examples form a step, and how they lie in rows. Pure arithmetic, no I/O.

A step is a function of the seed and its number alone, so resuming needs nothing but the number.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimizer steps that see each example once; the last batch may be short."""
    return math.ceil(examples / batch_size)


def total_steps(examples: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a whole run; `max_steps` overrides `epochs`."""
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil(epochs * steps_per_epoch(examples, batch_size) - 1e-9))


def step_indices(examples: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
    """The examples of optimizer step `step`, which counts from 1.

    Returns:
        int64 (batch,) places in the data set; shorter in an epoch's last step.
    """
    epoch, place = divmod(step - 1, steps_per_epoch(examples, batch_size))
    order = _epoch_order(examples, seed, epoch)
    return order[place * batch_size : (place + 1) * batch_size]


@lru_cache(maxsize=8)
def _epoch_order(examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(examples)


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put whole examples into rows of at most `budget` tokens, longest first, best fit.

    Args:
        lengths: tokens of each example.
        budget: tokens a row may hold; a longer example gets a row of its own.

    Returns:
        Rows of places in `lengths`; every place stands in exactly one row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
        fits = [row for row, left in enumerate(room) if left >= lengths[place]]
        if fits:
            best = min(fits, key=lambda row: room[row])
            rows[best].append(place)
            room[best] -= lengths[place]
        else:
            rows.append([place])
            room.append(budget - lengths[place])
    return rows


def deal(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """Deal rows to workers, the largest first to whoever has least.

    Args:
        sizes: tokens of each row.
        workers: number of workers.

    Returns:
        For each worker the places of its rows in `sizes`.
    """
    hands: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for place in sorted(range(len(sizes)), key=lambda p: (-sizes[p], p)):
        least = min(range(workers), key=lambda worker: loads[worker])
        hands[least].append(place)
        loads[least] += sizes[place]
    return hands
