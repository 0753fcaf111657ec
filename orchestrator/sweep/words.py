"""Keys, values, times and counts as people read them. Pure."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.tracking.secrets import redact

STATES = ("finished", "stopped", "failed", "interrupted", "running", "waiting")
"""The states of trials in the order they are told."""
_LARGE = 1000
_SHORT = 9.95


def shown(value: Any) -> str:
    """A value of the job file, without secrets."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item) for item in value)
    if isinstance(value, Mapping):
        return redact(json.dumps(value, default=str))
    return redact(str(value))


def short_labels(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last part; the whole key where two end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def metric_name(metric: str) -> str:
    """Such as eval loss."""
    return {"train_loss": "training loss"}.get(metric, metric.replace("_", " "))


def measured(value: float | None) -> str:
    """A metric's value; empty where there is none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= _LARGE else f"{value:.4f}"


def duration(seconds: float) -> str:
    """As 0.4 s, 42 s, 3:05 min or 2:10 h."""
    if seconds < _SHORT:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def counted(states: Sequence[str]) -> str:
    """How many trials are in which state: "5 finished, 2 stopped, 1 failed"."""
    counts = Counter(states)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
