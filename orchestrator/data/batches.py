"""Which examples form a step, and how they lie in rows. Pure arithmetic, no I/O.

A step is a function of the seed and its number alone, so resuming needs nothing but the number.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import lru_cache
from heapq import heappop, heappush

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
    # A copy: the cached order cannot be changed by who gets a part of it.
    return order[place * batch_size : (place + 1) * batch_size].astype(np.int64)


@lru_cache(maxsize=8)
def _epoch_order(examples: int, seed: int, epoch: int) -> NDArray[np.uint32]:
    return np.random.default_rng((seed, epoch)).permutation(examples).astype(np.uint32)


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put whole examples into rows of at most `budget` tokens, longest first, best fit.

    Args:
        lengths: tokens of each example.
        budget: tokens a row may hold; a longer example gets a row of its own.

    Returns:
        Rows of places in `lengths`; every place stands in exactly one row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), least first
    for place in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
        best = bisect_left(room, (lengths[place], 0))
        if best < len(room):
            left, row = room.pop(best)
            rows[row].append(place)
        else:
            left, row = budget, len(rows)
            rows.append([place])
        insort(room, (left - lengths[place], row))
    return rows


def deal(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """Deal examples to workers, the largest first to whoever has least.

    Args:
        sizes: tokens of each example.
        workers: number of workers.

    Returns:
        For each worker the places of its examples in `sizes`.
    """
    hands: list[list[int]] = [[] for _ in range(workers)]
    loads = [(0, worker) for worker in range(workers)]  # a heap: (tokens, worker)
    for place in sorted(range(len(sizes)), key=lambda p: (-sizes[p], p)):
        load, least = heappop(loads)
        hands[least].append(place)
        heappush(loads, (load + sizes[place], least))
    return hands
