"""One sweep: Ray Tune deciding about trials, and the engines that train them."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.cluster.plan import WorkerPlan, plan_workers
from orchestrator.cluster.session import Session, check_kept
from orchestrator.config import JobConfig
from orchestrator.errors import InterruptedRunError, OrchestratorError, last_line
from orchestrator.imports import import_beside
from orchestrator.plan import Gpu, refusal, unfit_trial
from orchestrator.plan.fit import train_apart
from orchestrator.sweep import places, space
from orchestrator.sweep.background import Background
from orchestrator.sweep.fitting import leave_out
from orchestrator.sweep.launch import RunningEngine
from orchestrator.sweep.look import look_at_gpu
from orchestrator.sweep.outcome import best_trial, outcomes
from orchestrator.sweep.trial import Context, engine_folder
from orchestrator.sweep.tuner import make_tuner
from orchestrator.tracking.observer import JournalObserver, stop_path
from orchestrator.tracking.store import tracking_uri

_WAIT_SECONDS = 0.5
# How long isolated trials may take to save their checkpoints when the user stops the sweep.
_SAVE_SECONDS = 120.0
_HASTE_SECONDS = 3.0
# What the report is made with; optuna imports the last one when it is asked.
_OF_THE_REPORT = ("orchestrator.sweep.report.pictures", "optuna.importance", "sklearn.ensemble")


@dataclass(frozen=True)
class _Sweep:
    """What every part of a sweep's driver needs.

    places: trials at a time. apart: whether each worker trains some of them by itself.
    """

    job: JobConfig
    run_dir: Path
    here: Session
    plan: WorkerPlan
    places: int
    apart: bool
    say: Callable[[str], None]

    @property
    def trials_dir(self) -> Path:
        return self.run_dir / "trials"

    def best(self) -> Any:
        """The best trial that was trained to its end."""
        sweep = self.job.sweep
        assert sweep is not None
        return best_trial(outcomes(self.trials_dir), sweep.metric, sweep.mode)

    def context(self, desk: Any) -> Context:
        """What every trial is told; without a desk each starts an engine of its own."""
        return Context(
            self.job,
            self.trials_dir,
            tracking_uri(self.job),
            desk,
            self.plan,
            self.here,
            os.getcwd(),
        )


def run(job: JobConfig, run_dir: Path, here: Session, say: Callable[[str], None]) -> dict[str, Any]:
    """Search, and wait for it.

    Args:
        job: the resolved job, whose sweep was checked.
        run_dir: the sweep's folder.
        here: the session.
        say: is told what the user should know.

    Returns:
        What the engines came to: proof of the best trial's adapter, and of those that trials
        shared also workers and peak_memory_bytes, of the leading one.

    Raises:
        OrchestratorError: the engine failed, or the user stopped it.
    """
    check_kept(run_dir)
    if space.is_shared(job):
        return _shared(_shared_sweep(job, run_dir, here, say))
    plan, count = places.isolated(job, here)
    _tell_places(run_dir, count)
    say(f"{count} trials at a time, each over a base of its own on {plan.least} worker(s)")
    return _isolated(_Sweep(job, run_dir, here, plan, count, False, say))


def _shared_sweep(
    job: JobConfig, run_dir: Path, here: Session, say: Callable[[str], None]
) -> _Sweep:
    """What fits of the search space, the workers that train it, and the trials at a time."""
    plan = plan_workers(job.cluster, here.nodes, here.most, here.own)
    on_gpu, gpu = plan.gpus > 0, look_at_gpu(plan, run_dir) if plan.gpus else None
    processes = plan.most if here.own and not on_gpu else 1
    job = leave_out(job, partial(_reason, on_gpu, gpu, processes), say)
    # How many there are of `auto` depends on what was left out.
    plan = plan_workers(places.cluster_of(job, here), here.nodes, here.most, here.own)
    count = places.shared(job, plan, gpu, here.own)
    apart = train_apart(count, plan.least)
    _tell_places(run_dir, count)
    if apart:
        plan = places.with_trials_for_all(plan, count)
        say(f"{count} trials at a time on {plan.least} workers, each with a base of its own")
    else:
        say(f"{count} trials at a time share one base on {plan.least} worker(s)")
    return _Sweep(job, run_dir, here, plan, count, apart, say)


def _reason(on_gpu: bool, gpu: Gpu | None, processes: int, job: JobConfig) -> str | None:
    """Why a trial's job cannot be trained here, if so."""
    try:
        plan = unfit_trial(job.model_copy(update={"sweep": None}), on_gpu, gpu, processes)
    except OrchestratorError:
        # A trial that cannot be at all, such as one of a layer that is not there, fails by itself.
        return None
    return None if plan is None else refusal(plan)


def _tell_places(run_dir: Path, count: int) -> None:
    with JournalObserver(run_dir) as observer:
        observer.emit("places", places=count)


def _shared(sweep: _Sweep) -> dict[str, Any]:
    """Trials as tenants of engines that serve them all."""
    with _engine(sweep, sweep.job, sweep.run_dir) as engine:
        tuning = _tune(sweep, engine.desk)
        with _left_behind(tuning):
            while not tuning.ended and not engine.ended:
                time.sleep(_WAIT_SECONDS)
            if not tuning.ended:
                engine.result()
                raise OrchestratorError("The engine ended before the trials; see Ray's logs")
        _speak_for(sweep.trials_dir, tuning.result(), sweep.say)
        best = sweep.best()
        import_beside(_OF_THE_REPORT)
        return engine.close(best and best.folder)


def _isolated(sweep: _Sweep) -> dict[str, Any]:
    """Each trial starts an engine for itself; one more proves the best adapter."""
    for folder in _engine_folders(sweep.trials_dir):
        # Left by engines that were killed.
        (folder / "running").unlink(missing_ok=True)
    tuning = _tune(sweep, None)
    with _left_behind(tuning):
        while not tuning.ended:
            time.sleep(_WAIT_SECONDS)
            if stop_path(sweep.run_dir).exists():
                _stop_engines(sweep.trials_dir)
                raise InterruptedRunError("The sweep was stopped; every trial has its checkpoint")
    _speak_for(sweep.trials_dir, tuning.result(), sweep.say)
    best = sweep.best()
    if best is None:
        return {}
    alone = replace(sweep, places=1, apart=False)
    with _engine(alone, best.job, sweep.run_dir) as engine:
        # It has trained nothing, so its memory says nothing.
        return {"proof": engine.close(best.folder).get("proof")}


def _engine(sweep: _Sweep, job: JobConfig, folder: Path) -> RunningEngine:
    output_dir = sweep.run_dir.parent
    return RunningEngine(
        job,
        folder,
        sweep.plan,
        sweep.here,
        sweep.say,
        sweep.places,
        sweep.apart,
        output_dir,
    )


def _tune(sweep: _Sweep, desk: Any) -> Background:
    tuner = make_tuner(sweep.job, sweep.run_dir, sweep.context(desk), sweep.places)
    return Background(tuner.fit)


@contextmanager
def _left_behind(tuning: Background) -> Iterator[None]:
    """Tune's loop ends before what it works with: with no engine it would only count failures.

    Asking a Ray that was left, its thread would end the whole process.
    """
    try:
        yield
    finally:
        if not tuning.ended:
            tuning.abandon(_HASTE_SECONDS)


def _speak_for(trials_dir: Path, found: Any, say: Callable[[str], None]) -> None:
    """Give a last word to trials that could not say it themselves."""
    for result in found:
        trial = Path(result.path).name
        if not (trials_dir / trial / "job.yaml").exists() and "error" in (result.metrics or {}):
            # Of values that make no job file.
            say(f"Trial {trial} of {result.config} failed: {result.metrics['error']}")
    errors = {Path(result.path).name: result.error for result in found}
    for outcome in outcomes(trials_dir):
        if outcome.trial_id not in errors and not outcome.settled:
            # It began just before a kill, and Tune knows nothing of it.
            word = ("interrupted", "The sweep was killed before it had noted this trial")
        elif errors.get(outcome.trial_id) and outcome.status not in ("failed", "finished"):
            # Tune has tried as often as it may.
            word = ("failed", last_line(errors[outcome.trial_id]))
        else:
            continue
        with JournalObserver(outcome.folder) as observer:
            observer.emit("finish", status=word[0], error=word[1])


def _engine_folders(trials_dir: Path) -> list[Path]:
    return [engine_folder(path.parent) for path in trials_dir.glob("*/job.yaml")]


def _stop_engines(trials_dir: Path) -> None:
    """Ask every isolated trial's engine to save and end, and wait for it."""
    running = [f for f in _engine_folders(trials_dir) if (f / "running").exists()]
    for folder in running:
        stop_path(folder).touch()
    end = time.monotonic() + _SAVE_SECONDS
    while any((f / "running").exists() for f in running) and time.monotonic() < end:
        time.sleep(_WAIT_SECONDS)
