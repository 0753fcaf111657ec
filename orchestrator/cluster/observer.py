"""Observers of Ray's workers: the journal, and beside it Ray's logs, metrics and drain notices."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from orchestrator.tracking.observer import JournalObserver, StopOnly
from orchestrator.tracking.system import SystemSampler

# event field: metric, what it says
_GAUGES = {
    "step": ("orchestrator_step", "Optimizer steps done"),
    "loss": ("orchestrator_loss", "Training loss of the last step, nats per token"),
    "tokens_per_second": ("orchestrator_tokens_per_second", "Tokens per second, all workers"),
    "seconds": ("orchestrator_step_seconds", "Seconds of the last step"),
    "collective_seconds": (
        "orchestrator_collective_seconds",
        "Seconds of the last step in the collective, on the leading worker",
    ),
}
_LOGGED = ("step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds")


class _Drain:
    """Whether Ray is about to take a node of this run away (a spot instance, a drain)."""

    def __init__(self) -> None:
        self._told: Any = None
        self._context = _preemption_context()

    @property
    def heard(self) -> bool:
        """Whether notices reach this process."""
        return self._context is not None

    def noticed(self) -> bool:
        """True once for each notice. Reads this process's memory only, so every step may ask."""
        notice = self._context and self._context.preemption_info
        fresh = notice is not None and notice != self._told
        self._told = notice
        return fresh


def _preemption_context() -> Any:
    """Where Ray Train leaves its notices in a worker; None in a release that has it elsewhere."""
    # The public function is a barrier of all workers with a call to an actor in it; the workers
    # agree on the answer in a collective of their own.
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context
    except (ImportError, AttributeError):
        return None


class Follower(StopOnly):
    """For the workers that do not lead. A context manager like `Leader`."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self._drain = _Drain()

    def save_requested(self) -> bool:
        """Whether this worker's run is about to lose a node."""
        return self._drain.noticed()

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_: object) -> None:
        return


class Leader(JournalObserver):
    """Writes the journal, one line of JSON per step to Ray's log, and Ray's metrics."""

    def __init__(self, run_dir: Path, name: str) -> None:
        super().__init__(run_dir)
        tags = {"run": name}
        self._drain = _Drain()
        self._gauges = {field: _gauge(*about, tags) for field, about in _GAUGES.items()}
        # No counter: one of a new process begins at 0, where no increase is seen.
        about = ("orchestrator_restarts", "Starts of the run's workers after the first")
        self._gauges["restarts"] = _gauge(*about, tags)
        self._shown: dict[str, float] = {}
        self._log = _logger()
        self._name = name
        self._sampler = SystemSampler(self.emit)
        if not self._drain.heard:
            self.emit(
                "warning",
                message="This release of Ray does not tell its workers that a node is drained: "
                "what was done since the last checkpoint is done again when the node is gone",
            )

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event, and show it to who watches Ray."""
        super().emit(event, **fields)
        if event == "step":
            self._shown |= {field: fields[field] for field in _GAUGES}
            shown = {field: fields[field] for field in _LOGGED}
            self._log.info(json.dumps({"run": self._name, **shown}))
        elif event == "warning":
            self._log.warning(json.dumps({"run": self._name, "warning": fields["message"]}))
        elif event == "start":
            self._shown["restarts"] = self.starts - 1
        # With the sampler's events too: Ray forgets a gauge that was not set for 20 seconds.
        for field, value in list(self._shown.items()):
            self._gauges[field].set(value)

    def save_requested(self) -> bool:
        """Whether this worker's run is about to lose a node."""
        return self._drain.noticed()

    def __enter__(self) -> "Leader":
        self._sampler.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._sampler.__exit__(*raised)
        super().__exit__(*raised)


def _gauge(name: str, description: str, tags: dict[str, str]) -> Gauge:
    gauge = Gauge(name, description, tuple(tags))
    gauge.set_default_tags(tags)
    return gauge


def _logger() -> logging.Logger:
    """Lines of their own on the worker's stdout, which Ray keeps and the dashboard shows."""
    log = logging.getLogger("orchestrator.steps")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    return log
