"""A trial as Ray Tune sees it: it joins the engine, waits for evaluations, and leaves."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray import tune

from orchestrator.cluster.plan import WorkerPlan
from orchestrator.cluster.priority import go_last
from orchestrator.cluster.session import Session
from orchestrator.config import JobConfig, SweepConfig
from orchestrator.errors import InterruptedRunError, OrchestratorError
from orchestrator.places import write_whole
from orchestrator.sweep.fitting import left_out
from orchestrator.sweep.space import trial_job
from orchestrator.tracking.observer import JournalObserver, stop_path
from orchestrator.training.membership import Member

if TYPE_CHECKING:
    # It brings Ray Train, which trials of shared engines do without: a quarter of a second each.
    from orchestrator.sweep.launch import RunningEngine

# Searchers and schedulers take no NaN: a trial that failed is worse than any that did not.
WORST = 1e9
_ASK_SECONDS = 20.0
_SLACK_SECONDS = 120.0
_PAUSE_SECONDS = 0.5
_POINTER = "checkpoint.json"


@dataclass(frozen=True)
class Context:
    """What every trial is told.

    desk: of the engines that all share; None where each starts one of its own. plan, here: what
    such an engine gets. working_dir: where the command was given, which relative paths mean.
    """

    job: JobConfig
    trials_dir: Path
    uri: str
    desk: Any
    plan: WorkerPlan
    here: Session
    working_dir: str

    @property
    def sweep(self) -> SweepConfig:
        """What is searched."""
        assert self.job.sweep is not None
        return self.job.sweep


def engine_folder(trial: Path) -> Path:
    """Where an isolated trial's engine has its journal; it holds `running` while it does."""
    return trial / ".engine"


class Trial(tune.Trainable):  # type: ignore[misc]
    """Waits at a desk; the process holds no model and no data."""

    def setup(self, config: dict[str, Any], context: Context) -> None:
        """Choose the trial's job; it joins the engine with its first step."""
        self._context = context
        if context.desk is not None and context.here.own and not context.plan.gpus:
            # From here on it only waits, beside an engine that computes on the same CPU.
            go_last(psutil.Process())
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self._name = self.trial_id
        self._after, self._generation = 0, 0
        self._fork: Path | None = None
        self._engine: RunningEngine | None = None
        self._choose(config)

    def _choose(self, config: dict[str, Any]) -> None:
        context, self._error = self._context, ""
        self._left_out = left_out(context.sweep, config)
        self._folder = context.trials_dir / self._name
        try:
            self._job = trial_job(context.job, self._name, context.trials_dir, config, context.uri)
        except OrchestratorError as error:
            self._error = str(error)

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation."""
        if self._error:
            return self._failed(self._error)
        self._write_job()
        if self._left_out:
            self._tell(self._left_out)
            return self._failed(self._left_out)
        while True:
            desk = self._desk()
            member = Member(self._job, self._folder, self._after, self._fork, self._generation)
            call = desk.ask.remote(self._name, member, _ASK_SECONDS)
            answer = ray.get(call, timeout=_ASK_SECONDS + _SLACK_SECONDS)
            if answer.failure is not None:
                return self._failed(answer.failure)
            if answer.report is not None:
                self._after = answer.report["step"]
                return {**answer.report, self._metric: self._value(answer.report)}
            if answer.gone:
                if failure := self._ended():
                    self._tell(failure)
                    return self._failed(failure)
                # Whoever ended the engine ends the trials too.
                time.sleep(_PAUSE_SECONDS)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Of which evaluation the engine's checkpoint is."""
        pointer = {"trial": self._name, "step": self._after}
        (Path(checkpoint_dir) / _POINTER).write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from there: one's own, or that of the trial whose place is taken over."""
        pointer = json.loads((Path(checkpoint) / _POINTER).read_text())
        self._after = pointer["step"]
        if pointer["trial"] != self._name:
            donor = self._context.trials_dir / pointer["trial"]
            self._fork = donor / "checkpoints" / f"step-{self._after:08d}"
            self._generation = time.time_ns()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial in the same process, or go on with another learning rate."""
        config = dict(new_config)
        if self.trial_id == self._name:
            self._generation = time.time_ns()
            self._choose(config)
        else:
            self._leave()
            self._begin(config)
        return True

    def cleanup(self) -> None:
        """Leave the engine; the place is free."""
        self._leave()

    def _desk(self) -> Any:
        """The desk of the shared engine, or of this trial's own, which is started for it."""
        if self._context.desk is not None:
            return self._context.desk
        if self._engine is None:
            from orchestrator.sweep.launch import RunningEngine

            if os.path.isdir(self._context.working_dir):
                # Tune has put this process into the trial's own folder.
                os.chdir(self._context.working_dir)
            folder = engine_folder(self._folder)
            folder.mkdir(parents=True, exist_ok=True)
            stop_path(folder).unlink(missing_ok=True)
            (folder / "running").touch()
            plan, here = self._context.plan, self._context.here
            output_dir = self._context.trials_dir.parent.parent
            self._engine = RunningEngine(self._job, folder, plan, here, print, 1, False, output_dir)
        return self._engine.desk

    def _ended(self) -> str | None:
        """Why this trial's own engine is no more, where that is the trial's failure.

        Raises:
            OrchestratorError: it is not.
        """
        if self._engine is None or not self._engine.ended:
            return None
        try:
            self._engine.result()
        except InterruptedRunError:
            (engine_folder(self._folder) / "running").unlink(missing_ok=True)
            return None
        except OrchestratorError as error:
            if type(error) is OrchestratorError:
                # Ray gave up, not the trial: Tune tries again, and the next command too.
                raise
            return str(error)
        raise OrchestratorError("The engine ended before the trial; see Ray's logs")

    @property
    def _metric(self) -> str:
        return self._context.sweep.metric

    def _value(self, report: dict[str, Any]) -> float:
        value = report.get(self._metric)
        return self._worst if value is None or not abs(value) < WORST else float(value)

    @property
    def _worst(self) -> float:
        return -WORST if self._context.sweep.mode == "max" else WORST

    def _failed(self, error: str) -> dict[str, Any]:
        return {"step": self._after, self._metric: self._worst, "error": error, "done": True}

    def _tell(self, failure: str) -> None:
        """The trial's last word, where its own engine ended before it could say it."""
        with JournalObserver(self._folder) as observer:
            observer.emit("finish", status="failed", error=failure)

    def _leave(self) -> None:
        desk = self._context.desk if self._engine is None else self._engine.desk
        if desk is not None:
            ray.get(desk.leave.remote(self._name, "stopped"), timeout=_SLACK_SECONDS)
        if self._engine is not None:
            with self._engine:
                self._engine = None
            (engine_folder(self._folder) / "running").unlink(missing_ok=True)

    def _write_job(self) -> None:
        from orchestrator.jobfile import dump_job
        from orchestrator.tracking.secrets import redact

        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._folder / "job.yaml", redact(dump_job(self._job)))
