"""One Ray Train run: as many QLoRA workers as the job asks for, restarted when they die."""

import math
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray.train
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator import allocator
from orchestrator.cluster.alone import Control, NothingToAskFor
from orchestrator.cluster.elastic import STOPPED, LivingNodes
from orchestrator.cluster.forming import Forming, StartsAgain
from orchestrator.cluster.group import GlooGroup
from orchestrator.cluster.plan import WorkerPlan, plan_workers
from orchestrator.cluster.session import Session, check_kept
from orchestrator.cluster.worker import train
from orchestrator.config import JobConfig
from orchestrator.errors import (
    InterruptedRunError,
    OrchestratorError,
    RefusedError,
    WorkerLostError,
    last_line,
)
from orchestrator.storage.place import Place, command_place
from orchestrator.tracking.journal import journal_path, last_step
from orchestrator.tracking.observer import stop_path

_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
# Ray's own is a minute; a cloud takes longer to bring a machine with a GPU, or others to end.
_START_SECONDS = {"there": 300, "to come": 1800}
_START_RETRIES = 3
# An elastic run is told of room before it starts. What others then take first it awaits so long,
# and counts the room anew; in all it waits as long.
_ELASTIC_START_SECONDS = 60
# How often an elastic run looks whether it can have more workers; each change restarts them.
_RESIZE_SECONDS = 30.0
# A controller in this process looks after its workers every two seconds.
_END_SECONDS = 3.0
# Between waits the main thread runs the handlers of signals.
_WAIT_SECONDS = 0.5
# So long after the last worker a run that has ended has told its result: Ray Train gives its own
# processes 12 seconds to end.
_RESULT_SECONDS = 30.0


def run(job: JobConfig, run_dir: Path, here: Session, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the job on Ray and wait for it.

    Args:
        job: the resolved job.
        run_dir: the run's folder.
        here: the session.
        say: is told what the user should know.

    Returns:
        The results of the leading worker.

    Raises:
        RefusedError: the cluster can never have what the job asks for.
        OrchestratorError: what the leading worker raised, or that workers kept dying.
    """
    check_kept(run_dir)
    plan = plan_workers(job.cluster, here.nodes, here.most, here.own)
    return run_workers(job, run_dir, plan, here, say, train, {"controls": here.own})


def run_workers(
    job: JobConfig,
    run_dir: Path,
    plan: WorkerPlan,
    here: Session,
    say: Callable[[str], None],
    work: Callable[[dict[str, Any]], Any],
    more: dict[str, Any],
) -> dict[str, Any]:
    """Start the workers of one Ray Train run in a session, and wait for them.

    Args:
        job: the resolved job.
        run_dir: the run's folder.
        plan: how many workers, with what each.
        here: the session.
        say: is told what the user should know.
        work: what each worker calls with its config.
        more: what the config holds beside the driver's own words; with `controls` Ray Train's
            controller runs in this process, which ends Ray with itself.

    Returns:
        The results of the leading worker.

    Raises:
        OrchestratorError: what the leading worker raised, or that workers kept dying.
    """
    with _proof(command_place(job, run_dir, trains=False)) as proof:
        seconds, retries = _patience(plan, grows=_tell(plan, here, say) or here.most is not None)
        config = {**more, **_loop_config(job, run_dir, plan, here, proof)}
        try:
            with _start_timeout(seconds):
                outcome = _wait(job, run_dir, _trainer(job, run_dir, plan, retries, work, config))
        finally:
            shutil.rmtree(run_dir / ".ray", ignore_errors=True)
    return result(outcome, run_dir)


def result(outcome: Any, run_dir: Path) -> dict[str, Any]:
    """The results that the leading worker returned.

    Args:
        outcome: what it returned.
        run_dir: the run's folder, with what the command has of its journal.

    Raises:
        OrchestratorError: it returned this error. Refused is only a run that has not begun, which a
            worker that cannot read the run's store does not know.
    """
    if isinstance(outcome, RefusedError) and last_step(run_dir):
        raise OrchestratorError(str(outcome)) from outcome
    if isinstance(outcome, OrchestratorError):
        raise outcome
    if not isinstance(outcome, dict):
        raise OrchestratorError("The workers ended without a result; see Ray's logs")
    return outcome


@contextmanager
def _proof(place: Place) -> Iterator[str]:
    """A word that only who shares the run's place can see."""
    proof = uuid.uuid4().hex
    place.leave(proof)
    try:
        yield proof
    finally:
        place.remove(proof)


def _tell(plan: WorkerPlan, here: Session, say: Callable[[str], None]) -> bool:
    """Say that the job waits, and what for; whether it does."""
    free = ray.available_resources()
    missing = {
        name: plan.least * amount - free.get(name, 0.0)
        for name, amount in plan.resources.items()
        if plan.least * amount > free.get(name, 0.0)
    }
    if missing:
        wanted = " and ".join(f"{amount:g} more {name}s" for name, amount in missing.items())
        how = "the autoscaler adds them" if plan.waits else "others free them"
        say(f"Waiting for {wanted}: the cluster has {here.here}; {how}")
    return bool(missing)


def _patience(plan: WorkerPlan, grows: bool) -> tuple[int, int]:
    """Seconds that workers may take to start, and how often they may take longer.

    Args:
        plan: how many workers.
        grows: whether what they need is still to come, now or when a node has died.
    """
    seconds = _START_SECONDS["to come" if grows else "there"]
    if not plan.elastic:
        return seconds, _START_RETRIES
    return _ELASTIC_START_SECONDS, _START_RETRIES * seconds // _ELASTIC_START_SECONDS


@contextmanager
def _start_timeout(seconds: int) -> Iterator[None]:
    """Ray Train reads it from the environment, where the user's own word stands."""
    if _START_TIMEOUT in os.environ:
        yield
        return
    os.environ[_START_TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        del os.environ[_START_TIMEOUT]


def _wait(job: JobConfig, run_dir: Path, trainer: "_Trainer") -> Any:
    """The leading worker's return value.

    Raises:
        InterruptedRunError: the user asked to stop while workers were awaited.
    """
    before = _written(run_dir)
    lived = time.monotonic()
    # In a sweep another thread may leave Ray at any moment, and ends its engines itself.
    asks = threading.current_thread() is threading.main_thread()
    waiting = _begin(trainer.fit)
    try:
        while not waiting.done():
            wait([waiting], timeout=_WAIT_SECONDS)
            begun = _written(run_dir) != before
            # Workers that train see the wish to stop themselves, and save what they have.
            if not stop_path(run_dir).exists() or (begun and (not asks or _workers_live())):
                lived = time.monotonic()
            elif not begun or time.monotonic() - lived > _RESULT_SECONDS:
                raise InterruptedRunError(STOPPED)
        return waiting.result().return_value
    except ray.train.TrainingFailedError as error:
        cause = getattr(error, "controller_failure", None)
        if isinstance(cause, OrchestratorError):
            raise cause from error
        raise OrchestratorError(_failure(job, error)) from error
    finally:
        if trainer.control is not None:
            trainer.control.end()
            wait([waiting], timeout=_END_SECONDS)


def _begin(work: Callable[[], Any]) -> Future[Any]:
    """A call in a thread, so that Ray leaves SIGINT alone: the first one asks for a checkpoint.

    The process ends without it. Where Ray was left meanwhile, a call that waits for an actor never
    returns: it spins.
    """
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found


def end_controllers() -> None:
    """Kill what Ray Train's calls wait for, on this machine: they return before Ray is left."""
    for controller in _living("TrainController"):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(controller["Pid"], signal.SIGKILL)


def _workers_live() -> bool:
    """Whether this command has any worker of Ray Train; none while replacements are awaited."""
    return bool(_living("RayTrainWorker"))


def _living(kind: str) -> list[dict[str, Any]]:
    """This command's actors of a class."""
    from ray._private.state import state

    here = ray.get_runtime_context().get_job_id()
    actors = state.actor_table(None, ray.JobID.from_hex(here), "ALIVE").values()
    return [actor for actor in actors if actor["ActorClassName"] == kind]


def _written(run_dir: Path) -> int:
    """Bytes of the journal, which grows as soon as the workers do."""
    path = journal_path(run_dir)
    return path.stat().st_size if path.exists() else 0


def _loop_config(
    job: JobConfig, run_dir: Path, plan: WorkerPlan, here: Session, proof: str
) -> dict[str, Any]:
    """What each worker is told."""
    return {
        "job": job,
        "run_dir": str(run_dir),
        "working_dir": os.getcwd(),
        "proof": proof,
        "gpus": plan.gpus,
        "own": here.own,
        "several_nodes": here.several_nodes,
        "collective_timeout": job.cluster.collective_timeout,
        # Who sets OMP_NUM_THREADS means it; Ray would set it to the worker's CPUs.
        "threads": int(os.environ.get("OMP_NUM_THREADS") or plan.threads),
    }


class _Trainer(DataParallelTrainer):  # type: ignore[misc]
    """With words of our own on starts, and without actors that no run of ours needs.

    Each of those is a process that wakes all the time. One deals out sets of `ray.data`; one
    removes placement groups that a controller left behind, and a Ray that ends with the command
    leaves none.
    """

    # Where this process has the controller itself.
    control: Control | None = None

    def _create_default_callbacks(self) -> list[Any]:
        unneeded: tuple[type, ...] = (DatasetsCallback,)
        if self.train_loop_config["own"]:
            unneeded += (PlacementGroupCleanerCallback,)
        default = super()._create_default_callbacks()
        return [Forming(), *(c for c in default if not isinstance(c, unneeded))]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["failure_policy"] = StartsAgain(self.run_config.failure_config)
        if self.scaling_config.elasticity_enabled:
            retries = self.run_config.failure_config.controller_failure_limit
            given["scaling_policy"] = LivingNodes(
                self.scaling_config,
                Path(self.train_loop_config["run_dir"]),
                retries * _ELASTIC_START_SECONDS,
            )
        elif self.train_loop_config["own"]:
            given["scaling_policy"] = NothingToAskFor(self.scaling_config)
        if self.control is not None:
            return self.control.run(given)
        return super()._initialize_and_run_controller(**given)


def _trainer(
    job: JobConfig,
    run_dir: Path,
    plan: WorkerPlan,
    retries: int,
    work: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
) -> _Trainer:
    silence = math.ceil(job.cluster.collective_timeout)
    settings = allocator.gpu_settings if plan.gpus else allocator.settings
    trainer = _Trainer(
        work,
        train_loop_config=config,
        # Workers agree over gloo; where they have GPUs they sum gradients in a group of NCCL's.
        backend_config=GlooGroup(silence),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.workers,
            use_gpu=plan.gpus > 0,
            resources_per_worker=plan.resources,
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
        ),
        run_config=ray.train.RunConfig(
            # Our own checkpoints decide where a run goes on; Ray's name is new for each attempt.
            name=f"{job.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(run_dir / ".ray"),
            failure_config=ray.train.FailureConfig(
                max_failures=job.cluster.max_failures, controller_failure_limit=retries
            ),
            worker_runtime_env={"env_vars": settings(os.environ)},
        ),
    )
    if config.get("controls"):
        trainer.control = Control()
    return trainer


def _failure(job: JobConfig, error: ray.train.TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", None)
    go_on = "Run the same command again to go on from the last checkpoint"
    if not failures:
        return f"Ray Train gave up: {last_line(error)}. {go_on}"
    rank, first = _first_failure(failures)
    return (
        f"The workers failed {job.cluster.max_failures + 1} times (cluster.max_failures is "
        f"{job.cluster.max_failures}). The last time worker {rank} failed first: "
        f"{last_line(first)}. {go_on}"
    )


def _first_failure(failures: dict[int, Exception]) -> tuple[int, Exception]:
    """Who failed by itself, not because another was gone."""
    for rank, error in sorted(failures.items()):
        if not isinstance(getattr(error, "_base_exc", error), WorkerLostError):
            return rank, error
    return min(failures.items())
