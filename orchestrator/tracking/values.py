"""A job and its events as MLflow's parameters and metrics. Pure; knows nothing of MLflow."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from orchestrator.config import JobConfig
from orchestrator.tracking.secrets import redact

_LONGEST_VALUE = 5000
_LONGEST_KEY = 250
_NOT_IN_KEYS = re.compile(r"[^\w\-. ]")
# event: the metrics it holds, each with its field
_METRICS: dict[str, dict[str, str]] = {
    "step": {
        name: name
        for name in (
            "loss",
            "learning_rate",
            "gradient_norm",
            "tokens",
            "target_tokens",
            "tokens_per_second",
            "seconds",
            "memory_bytes",
        )
    },
    "evaluation": {"eval_loss": "eval_loss", "perplexity": "perplexity"},
    "best": {f"best.{name}": name for name in ("steps", "eval_loss", "train_loss")},
    "trials": {
        **{f"trials.{state}": state for state in ("finished", "stopped", "failed")},
        "total_tokens": "tokens",
    },
    # Metrics, for tags are texts and sort as such.
    "finish": {f"total_{name}": name for name in ("steps", "tokens", "seconds")},
}


class Reading(NamedTuple):
    """One value of one metric, at the journal's own time: delivered twice, it stands there once."""

    name: str
    value: float
    milliseconds: int
    step: int


def parameters(job: JobConfig) -> dict[str, str]:
    """The whole job file, flattened with dots, without secrets."""
    return {key(name): text(value) for name, value in _flat(job.model_dump(mode="json"))}


def readings(event: Mapping[str, Any]) -> list[Reading]:
    """The event's metrics; values that are not finite are in `broken`."""
    moment = milliseconds(event)
    if event["event"] == "system":
        # A sampler has no step of its own that a restart would keep; seconds grow for ever.
        step, names = moment // 1000, [(f"system/{n}", n) for n in event if n != "time"]
    else:
        step, names = event.get("step", 0), list(_METRICS.get(event["event"], {}).items())
    return [
        Reading(name, float(event[field]), moment, step)
        for name, field in names
        if _is_number(event.get(field)) and math.isfinite(event[field])
    ]


def broken(event: Mapping[str, Any]) -> dict[str, str]:
    """What no chart can show, as tags: `{"not_finite.loss": "nan at step 7"}`."""
    return {
        f"not_finite.{name}": f"{event[field]} at step {event.get('step')}"
        for name, field in _METRICS.get(event["event"], {}).items()
        if _is_number(event.get(field)) and not math.isfinite(event[field])
    }


def milliseconds(event: Mapping[str, Any]) -> int:
    """The event's time as MLflow counts it."""
    return int(event["time"] * 1000)


def key(name: str) -> str:
    """A name that MLflow accepts."""
    return _NOT_IN_KEYS.sub("_", redact(name))[:_LONGEST_KEY]


def text(value: Any) -> str:
    """A value that MLflow accepts, without secrets."""
    return redact(str(value))[:_LONGEST_VALUE]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
