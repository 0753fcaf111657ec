"""How many workers a job gets, with what each. Pure arithmetic, no Ray."""

from dataclasses import dataclass

from orchestrator.config import ClusterConfig
from orchestrator.errors import RefusedError


@dataclass(frozen=True)
class WorkerPlan:
    """What Ray Train is asked for. `threads` is what torch uses on a CPU worker."""

    workers: int | tuple[int, int]
    gpus: float
    cpus: float
    threads: int

    @property
    def resources(self) -> dict[str, float]:
        """Resources of one worker, in Ray's words."""
        own = {"CPU": self.cpus}
        return {**own, "GPU": self.gpus} if self.gpus else own


def plan_workers(config: ClusterConfig, cpus: float, gpus: float, own: bool) -> WorkerPlan:
    """Workers for a cluster of so many CPUs and GPUs.

    Args:
        config: the job's `cluster` section.
        cpus: CPUs of the cluster.
        gpus: GPUs of the cluster.
        own: whether the cluster was started for this job alone; its workers then use all cores.

    Raises:
        RefusedError: the job asks for more than is there.
    """
    per_worker = _gpus_per_worker(config, gpus)
    workers: int | tuple[int, int]
    if config.workers == "auto":
        workers = max(1, int(gpus // per_worker)) if per_worker else 1
    else:
        workers = config.workers
    least = workers if isinstance(workers, int) else workers[0]
    if least * per_worker > gpus or least * config.cpus_per_worker > cpus:
        raise RefusedError(
            f"cluster.workers: {least} workers of {config.cpus_per_worker:g} CPUs and "
            f"{per_worker:g} GPUs were asked for; the cluster has {cpus:g} CPUs and {gpus:g} GPUs"
        )
    share = int(cpus // least) if own else int(config.cpus_per_worker)
    return WorkerPlan(workers, per_worker, config.cpus_per_worker, max(1, share))


def _gpus_per_worker(config: ClusterConfig, gpus: float) -> float:
    if config.gpus_per_worker != "auto":
        return config.gpus_per_worker
    return 1.0 if gpus else 0.0
