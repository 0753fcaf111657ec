"""One trial's state, kept up to date from its journal; nothing of it is read twice."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.jobfile import load_job
from orchestrator.sweep.space import value_of
from orchestrator.sweep.words import short_labels, shown
from orchestrator.tracking.journal import journal_path, read_events

ENDED = ("finished", "stopped", "failed")


class TrialState:
    """What is known of a trial by now. `news` reads on.

    state: waiting (for a place), running, finished, stopped or failed. step, total: optimizer
    steps done and of the whole trial, 0 before its start. seconds: of training steps. began: Unix
    time of the first event, infinite before it.
    """

    def __init__(self, folder: Path, keys: tuple[str, ...]) -> None:
        self.name, self.state = folder.name, "waiting"
        self.step = self.total = 0
        self.seconds, self.began = 0.0, math.inf
        self._folder, self._keys = folder, keys
        self._offset = 0
        self._metrics: dict[str, float] = {}
        self._params: dict[str, str] | None = None

    def news(self) -> Iterator[dict[str, Any]]:
        """The journal's events since the last call; each is taken in before it is given."""
        path = journal_path(self._folder)
        if not path.exists() or path.stat().st_size <= self._offset:
            return
        for event, offset in read_events(path, self._offset):
            self._offset = offset
            self._take_in(event)
            yield event

    def forget_running(self) -> None:
        """Nobody trains it now: the command that did is no more."""
        if self.state not in ENDED:
            self.state = "waiting"

    def latest(self, metric: str) -> float | None:
        """The metric's latest value after a step."""
        return self._metrics.get(metric)

    @property
    def done(self) -> float:
        """The share of the trial that is over, from 0 to 1."""
        if self.state in ENDED:
            return 1.0
        return self.step / self.total if self.total else 0.0

    @property
    def params(self) -> dict[str, str]:
        """The searched values; none where the job file is gone."""
        if self._params is None:
            try:
                job = load_job(self._folder / "job.yaml")
            except OrchestratorError:
                return {}
            self._params = {key: shown(value_of(job, key)) for key in self._keys}
        return self._params

    def described(self) -> str:
        """The searched values in one line."""
        labels = short_labels(self._keys)
        return ", ".join(f"{labels[key]} {value}" for key, value in self.params.items())

    def _take_in(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        self.began = min(self.began, event["time"])
        if kind == "start":
            # Who was trained to its end may be asked once more what it came to.
            self.state = self.state if self.state == "finished" else "running"
            self.total = event["total_steps"]
            # A scheduler may have changed its values.
            self._params = None
        elif kind == "step":
            self.step, self.seconds = event["step"], self.seconds + event["seconds"]
            self._metrics["train_loss"] = event["loss"]
            self._metrics["tokens_per_second"] = event["tokens_per_second"]
        elif kind == "evaluation" and event["step"] > 0:
            self._metrics["eval_loss"] = event["eval_loss"]
            self._metrics["perplexity"] = event["perplexity"]
        elif kind == "adapter":
            self.state = "finished"
        elif kind == "finish" and self.state != "finished":
            self.state = event["status"]
