"""Observers of Ray's workers: the journal, and beside it Ray's logs, metrics and drain notices."""

import json
import logging
import sys
from functools import cache
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from orchestrator.tracking.observer import JournalObserver, StopOnly
from orchestrator.tracking.system import SystemSampler

# event field: metric, what it says
_OF_A_STEP = {
    "step": ("orchestrator_step", "Optimizer steps done"),
    "loss": ("orchestrator_loss", "Training loss of the last step, nats per token"),
    "tokens_per_second": ("orchestrator_tokens_per_second", "Tokens per second, all workers"),
    "seconds": ("orchestrator_step_seconds", "Seconds of the last step"),
    "collective_seconds": (
        "orchestrator_collective_seconds",
        "Seconds of the last step in the collective, on the worker that tells",
    ),
}
_GAUGES = {
    **_OF_A_STEP,
    # No counter: one of a new process begins at 0, where no increase is seen.
    "restarts": ("orchestrator_restarts", "Starts of the run's workers after the first"),
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

    def emit(self, event: str, **fields: Any) -> None:
        """Nothing but warnings, to Ray's log: one that trains apart has some of its own."""
        if event == "warning":
            _logger().warning(json.dumps({"warning": fields["message"]}))

    def save_requested(self) -> bool:
        """Whether this worker's run is about to lose a node."""
        return self._drain.noticed()

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_: object) -> None:
        return


class Shown(JournalObserver):
    """Writes a journal, one line of JSON per step to Ray's log, and Ray's metrics."""

    def __init__(self, run_dir: Path, name: str) -> None:
        super().__init__(run_dir)
        self._values: dict[str, float] = {}
        self._log = _logger()
        self._name = name

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event, and show it to who watches Ray."""
        super().emit(event, **fields)
        if event == "step":
            self._values |= {field: fields[field] for field in _OF_A_STEP}
            shown = {field: fields[field] for field in _LOGGED}
            self._log.info(json.dumps({"run": self._name, **shown}))
        elif event == "warning":
            self._log.warning(json.dumps({"run": self._name, "warning": fields["message"]}))
        elif event == "start":
            self._values["restarts"] = self.starts - 1
        # With the sampler's events too: Ray forgets a gauge that was not set for 20 seconds.
        for field, value in list(self._values.items()):
            _gauge(field).set(value, {"run": self._name})


class Leader(Shown):
    """Of the worker that leads: samples the system too, and hears of nodes that are drained."""

    def __init__(self, run_dir: Path, name: str) -> None:
        super().__init__(run_dir, name)
        self._drain = _Drain()
        self._sampler = SystemSampler(self.emit)
        if not self._drain.heard:
            self.emit(
                "warning",
                message="This release of Ray does not tell its workers that a node is drained: "
                "what was done since the last checkpoint is done again when the node is gone",
            )

    def save_requested(self) -> bool:
        """Whether this worker's run is about to lose a node."""
        return self._drain.noticed()

    def __enter__(self) -> "Leader":
        self._sampler.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._sampler.__exit__(*raised)
        super().__exit__(*raised)


@cache
def _gauge(field: str) -> Gauge:
    """One for all runs of this process."""
    return Gauge(*_GAUGES[field], ("run",))


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
