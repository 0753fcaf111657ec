"""One Ray Train run: as many QLoRA workers as the job asks for, restarted when they die."""

import os
import uuid
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.cluster.plan import WorkerPlan, plan_workers
from orchestrator.cluster.session import session
from orchestrator.cluster.worker import train
from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError

_CONTROLLER_FAILURES = 3
# Between waits the main thread runs the handlers of signals.
_WAIT_SECONDS = 0.5


def run(job: JobConfig, run_dir: Path) -> dict[str, Any]:
    """Run the job on Ray and wait for it.

    Returns:
        The results of the leading worker.

    Raises:
        OrchestratorError: what the leading worker raised, or that workers kept dying.
    """
    with session(job.cluster.address) as here:
        plan = plan_workers(job.cluster, here.cpus, here.gpus, here.own)
        trainer = _trainer(job, run_dir, plan)
        outcome = _wait(job, trainer)
    if isinstance(outcome, OrchestratorError):
        raise outcome
    if not isinstance(outcome, dict):
        raise OrchestratorError("The workers ended without a result; see Ray's logs")
    return outcome


def _wait(job: JobConfig, trainer: TorchTrainer) -> Any:
    """The leading worker's return value."""
    # In a thread, so that Ray leaves SIGINT alone: the first one asks for a checkpoint.
    pool = ThreadPoolExecutor(1)
    waiting = pool.submit(trainer.fit)
    try:
        while not waiting.done():
            wait([waiting], timeout=_WAIT_SECONDS)
        return waiting.result().return_value
    except ray.train.TrainingFailedError as error:
        raise OrchestratorError(_failure(job, error)) from error
    finally:
        pool.shutdown(wait=False)


def _trainer(job: JobConfig, run_dir: Path, plan: WorkerPlan) -> TorchTrainer:
    return TorchTrainer(
        train,
        train_loop_config={
            "job": job,
            "run_dir": str(run_dir),
            "working_dir": os.getcwd(),
            # Who sets OMP_NUM_THREADS means it; Ray would set it to the worker's CPUs.
            "threads": int(os.environ.get("OMP_NUM_THREADS") or plan.threads),
        },
        torch_config=TorchConfig(backend="nccl" if plan.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.workers,
            use_gpu=plan.gpus > 0,
            resources_per_worker=plan.resources,
        ),
        run_config=ray.train.RunConfig(
            # Our own checkpoints decide where a run goes on; Ray's name is new for each attempt.
            name=f"{job.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(run_dir / ".ray"),
            failure_config=ray.train.FailureConfig(
                max_failures=job.cluster.max_failures,
                controller_failure_limit=_CONTROLLER_FAILURES,
            ),
        ),
    )


def _failure(job: JobConfig, error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (
        f"The workers failed {job.cluster.max_failures + 1} times (cluster.max_failures is "
        f"{job.cluster.max_failures}). The last error: {lines[-1] if lines else error}. Run the "
        "same command again to go on from the last checkpoint"
    )
