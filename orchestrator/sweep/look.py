"""What the workers' GPUs have: the command's own machine may have another, or none."""

from contextlib import suppress
from pathlib import Path

import ray

from orchestrator.cluster.plan import WorkerPlan
from orchestrator.errors import InterruptedRunError
from orchestrator.plan import Gpu, describe_gpu
from orchestrator.tracking.observer import stop_path

_WAIT_SECONDS = 0.5


def look_at_gpu(plan: WorkerPlan, run_dir: Path, seconds: float = 1800.0) -> Gpu | None:
    """Look from a process in a worker's place, which ends with its look.

    Args:
        plan: what a worker gets.
        run_dir: the sweep's folder, in which the user asks to stop.
        seconds: how long an autoscaler may take to bring a GPU.

    Returns:
        None where workers have GPUs in name only, or none came in time; the workers wait again.

    Raises:
        InterruptedRunError: the user asked to stop.
    """
    look = ray.remote(num_gpus=plan.gpus, num_cpus=plan.cpus, max_calls=1, max_retries=3)
    call = look(describe_gpu).remote()
    left = seconds
    while left > 0:
        found, _ = ray.wait([call], timeout=_WAIT_SECONDS)
        if found:
            # What keeps the process from looking keeps workers from training; they tell better.
            with suppress(ray.exceptions.RayError):
                answer: Gpu | None = ray.get(call)
                return answer
            return None
        if stop_path(run_dir).exists():
            break
        left -= _WAIT_SECONDS
    ray.cancel(call)
    if stop_path(run_dir).exists():
        raise InterruptedRunError(
            "Stopped while the sweep waited for a GPU. Run the same command again to go on"
        )
    return None
