"""A trial as Ray Tune sees it: it joins the engine, waits for evaluations, and leaves."""

import json
from pathlib import Path
from typing import Any

import ray
from ray import tune

from orchestrator.errors import OrchestratorError
from orchestrator.sweep.space import trial_job
from orchestrator.training.membership import Member

# Searchers and schedulers take no NaN: a trial that failed is worse than any that did not.
WORST = 1e9
_ASK_SECONDS = 20.0
_SLACK_SECONDS = 120.0
_POINTER = "checkpoint.json"


class Trial(tune.Trainable):  # type: ignore[misc]
    """Waits at the desk; the process holds no model and no data."""

    def setup(self, config: dict[str, Any], context: dict[str, Any]) -> None:
        """Choose the trial's job; it joins the engine with its first step."""
        self._context = context
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self._name = self.trial_id
        self._after, self._generation = 0, 0
        self._fork: Path | None = None
        self._choose(config)

    def _choose(self, config: dict[str, Any]) -> None:
        context, self._error = self._context, ""
        self._folder = Path(context["trials_dir"]) / self._name
        try:
            self._job = trial_job(
                context["job"], self._name, self._folder.parent, config, context["uri"]
            )
        except OrchestratorError as error:
            self._error = str(error)

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation."""
        if self._error:
            return self._failed(self._error)
        self._write_job()
        while True:
            member = Member(self._job, self._folder, self._after, self._fork, self._generation)
            call = self._context["desk"].ask.remote(self._name, member, _ASK_SECONDS)
            answer = ray.get(call, timeout=_ASK_SECONDS + _SLACK_SECONDS)
            if answer.failure is not None:
                return self._failed(answer.failure)
            if answer.report is not None:
                self._after = answer.report["step"]
                return {**answer.report, self._metric: self._value(answer.report)}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Where the engine's checkpoint of the last evaluation lies."""
        path = self._folder / "checkpoints" / f"step-{self._after:08d}"
        pointer = {"path": str(path), "step": self._after}
        (Path(checkpoint_dir) / _POINTER).write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from there: one's own, or that of the trial whose place is taken over."""
        pointer = json.loads((Path(checkpoint) / _POINTER).read_text())
        path = Path(pointer["path"])
        self._after = pointer["step"]
        if path.parent.parent != self._folder:
            self._fork = path
            self._generation += 1

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial in the same process, or go on with another learning rate."""
        config = dict(new_config)
        if self.trial_id == self._name:
            self._generation += 1
            self._choose(config)
        else:
            self._leave()
            self._begin(config)
        return True

    def cleanup(self) -> None:
        """Leave the engine; the place is free."""
        self._leave()

    @property
    def _metric(self) -> str:
        metric: str = self._context["job"].sweep.metric
        return metric

    def _value(self, report: dict[str, Any]) -> float:
        value = report.get(self._metric)
        return WORST if value is None or not abs(value) < WORST else float(value)

    def _failed(self, error: str) -> dict[str, Any]:
        return {"step": self._after, self._metric: WORST, "error": error, "done": True}

    def _leave(self) -> None:
        ray.get(self._context["desk"].leave.remote(self._name, "stopped"), timeout=_SLACK_SECONDS)

    def _write_job(self) -> None:
        from orchestrator.jobfile import dump_job
        from orchestrator.tracking.secrets import redact

        self._folder.mkdir(parents=True, exist_ok=True)
        beside = self._folder / ".job.yaml"
        beside.write_text(redact(dump_job(self._job)))
        beside.replace(self._folder / "job.yaml")
