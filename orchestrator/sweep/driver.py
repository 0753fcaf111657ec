"""One sweep: the engine as a Ray Train run, and Ray Tune deciding about its tenants."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune

from orchestrator.cluster.driver import run_workers
from orchestrator.cluster.plan import plan_workers
from orchestrator.cluster.session import session
from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError, first_line
from orchestrator.sweep import search
from orchestrator.sweep.desk import open_desk
from orchestrator.sweep.engine import serve
from orchestrator.sweep.outcome import best_trial, outcomes
from orchestrator.sweep.trial import Trial
from orchestrator.tracking.store import tracking_uri

_TUNE_FOLDER = ".tune"
# Tune's own state is what a killed sweep goes on from; trials keep theirs in their folders.
_SETTINGS = {
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
# A trial only waits; Tune refuses 0.
_TRIAL_CPUS = 0.001
_MOST_CONCURRENT = {"cpu": 4, "gpu": 16}
_WAIT_SECONDS = 0.5
_END_SECONDS = 120.0
_ENDLESS = 10**6


def run(job: JobConfig, run_dir: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Search, and wait for it.

    Args:
        job: the resolved job, whose sweep was checked.
        run_dir: the sweep's folder.
        say: is told what the user should know.

    Returns:
        What the engine came to: workers, peak_memory_bytes, proof of the best trial's adapter.

    Raises:
        OrchestratorError: the engine failed, or the user stopped it.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with session(job.cluster.address, say) as here:
        plan = plan_workers(job.cluster, here.here, here.most, here.own)
        places = _places(job, plan.gpus > 0)
        say(f"{places} trials at a time share one base on {plan.least} worker(s)")
        desk = open_desk(places)
        ray.get(desk.ready.remote(), timeout=_END_SECONDS)
        engine = _Background(
            lambda: run_workers(job, run_dir, plan, here, say, serve, {"desk": desk}),
            lambda: ray.get(desk.engine_ended.remote(), timeout=_WAIT_SECONDS * 20),
        )
        tuner = _Background(lambda: _tuner(job, run_dir, desk, places).fit(), lambda: None)
        while not tuner.ended and not engine.ended:
            time.sleep(_WAIT_SECONDS)
        if not tuner.ended:
            engine.result()
            raise OrchestratorError("The engine ended before the trials; see Ray's logs")
        tuner.result()
        best = best_trial(outcomes(run_dir / "trials"))
        ray.get(desk.close.remote(best and best.folder), timeout=_END_SECONDS)
        engine.wait()
        return dict(engine.result())


class _Background:
    """A call in a thread of its own, which ends with the process."""

    def __init__(self, work: Callable[[], Any], after: Callable[[], Any]) -> None:
        self._work, self._after = work, after
        self._value: Any = None
        self._error: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the call is over; signals are handled in between."""
        while not self.ended:
            self._thread.join(_WAIT_SECONDS)

    @property
    def ended(self) -> bool:
        """Whether the call is over."""
        return not self._thread.is_alive()

    def result(self) -> Any:
        """What the call returned.

        Raises:
            OrchestratorError: what it raised.
        """
        if isinstance(self._error, OrchestratorError):
            raise self._error
        if self._error is not None:
            raise OrchestratorError(
                f"{first_line(self._error)}. Run the same command again to go on"
            ) from self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:
            self._error = error
        finally:
            try:
                self._after()
            except Exception as error:
                self._error = self._error or error


def _tuner(job: JobConfig, run_dir: Path, desk: Any, places: int) -> tune.Tuner:
    sweep = job.sweep
    assert sweep is not None
    folder = run_dir / _TUNE_FOLDER
    context = {
        "desk": desk,
        "job": job,
        "trials_dir": str(run_dir / "trials"),
        "uri": tracking_uri(job),
    }
    trainable = tune.with_resources(
        tune.with_parameters(Trial, context=context), {"CPU": _TRIAL_CPUS}
    )
    if tune.Tuner.can_restore(str(folder)):
        return tune.Tuner.restore(str(folder), trainable, resume_unfinished=True)
    # Rungs beyond the trials' real end are never reached.
    total = job.training.max_steps or _ENDLESS
    return tune.Tuner(
        trainable,
        param_space=search.param_space(sweep),
        tune_config=tune.TuneConfig(
            metric=None if sweep.scheduler != "none" else sweep.metric,
            mode=None if sweep.scheduler != "none" else "min",
            search_alg=search.searcher(sweep),
            scheduler=search.scheduler(job, sweep, total),
            num_samples=1 if sweep.searcher == "grid" else sweep.trials,
            max_concurrent_trials=places,
            time_budget_s=sweep.time_budget,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=_TUNE_FOLDER,
            storage_path=str(run_dir),
            failure_config=tune.FailureConfig(max_failures=job.cluster.max_failures),
            verbose=0,
        ),
    )


def _places(job: JobConfig, on_gpu: bool) -> int:
    sweep = job.sweep
    assert sweep is not None
    if sweep.concurrent != "auto":
        return min(int(sweep.concurrent), sweep.trials)
    return min(sweep.trials, _MOST_CONCURRENT["gpu" if on_gpu else "cpu"])
