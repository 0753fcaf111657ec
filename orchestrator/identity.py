"""Whether a run's folder belongs to the job at hand. Pure comparison of job files."""

from collections.abc import Iterator
from typing import Any

from orchestrator.config import JobConfig

# What may change between two commands over one run without changing what was trained so far.
_FREE = (
    "output_dir",
    "training.tokens_per_pass",
    "training.gradient_checkpointing",
    "training.max_steps",
    "training.epochs",
    "evaluation.",
    "checkpoint.",
    "cluster.",
    "tracking.",
    "sweep",
)


# What may change between two commands over one sweep; Tune keeps the search that it began.
_FREE_IN_SWEEPS = (
    "output_dir",
    "training.tokens_per_pass",
    "training.gradient_checkpointing",
    "cluster.",
    "tracking.",
    "sweep.concurrent",
)

# A key, its value before and now.
Change = tuple[str, Any, Any]


def changed_keys(before: JobConfig, now: JobConfig) -> list[Change]:
    """Keys on which the two jobs would train differently, with both values.

    The number of steps may grow only where it does not bend the learning rate's schedule.
    """
    free: tuple[str, ...] = _FREE
    if now.training.scheduler != "constant":
        free = tuple(key for key in _FREE if key not in ("training.max_steps", "training.epochs"))
    return _changes(before, now, free)


def changed_sweep_keys(before: JobConfig, now: JobConfig) -> list[Change]:
    """Keys on which the two jobs would search or train differently, with both values."""
    return _changes(before, now, _FREE_IN_SWEEPS)


def _changes(before: JobConfig, now: JobConfig, free: tuple[str, ...]) -> list[Change]:
    old, new = dict(_flat(before.model_dump())), dict(_flat(now.model_dump()))
    return [
        (key, old.get(key), new.get(key))
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not key.startswith(free)
    ]


def _flat(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
