"""How many workers a job gets, with what each. Pure arithmetic, no Ray."""

from dataclasses import dataclass

from orchestrator.config import ClusterConfig
from orchestrator.errors import RefusedError


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs of a cluster."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


@dataclass(frozen=True)
class WorkerPlan:
    """What Ray Train is asked for.

    threads: what torch uses on a CPU worker. waits: an autoscaler must add nodes first.
    """

    workers: int | tuple[int, int]
    gpus: float
    cpus: float
    threads: int
    waits: bool = False

    @property
    def least(self) -> int:
        """Workers without which the job does not start."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def resources(self) -> dict[str, float]:
        """Resources of one worker, in Ray's words."""
        own = {"CPU": self.cpus}
        return {**own, "GPU": self.gpus} if self.gpus else own


def plan_workers(
    config: ClusterConfig, here: Resources, most: Resources | None, own: bool
) -> WorkerPlan:
    """Workers for a cluster.

    Args:
        config: the job's `cluster` section.
        here: what the cluster has now.
        most: what its autoscaler may bring it to; None where there is none.
        own: whether the cluster was started for this job alone; its workers then use all cores.

    Raises:
        RefusedError: the job asks for more than the cluster can ever have.
    """
    reach = (
        here if most is None else Resources(max(here.cpus, most.cpus), max(here.gpus, most.gpus))
    )
    per_worker = _gpus_per_worker(config, reach.gpus)
    workers = _workers(config, per_worker, here, reach)
    least = workers if isinstance(workers, int) else workers[0]
    if not _fit(least, per_worker, config.cpus_per_worker, reach):
        grown = "" if most is None else f", {reach} with all that its autoscaler may add"
        raise RefusedError(
            f"cluster.workers: {least} workers of {config.cpus_per_worker:g} CPUs and "
            f"{per_worker:g} GPUs were asked for; the cluster has {here}{grown}"
        )
    share = int(here.cpus // least) if own else int(config.cpus_per_worker)
    waits = not _fit(least, per_worker, config.cpus_per_worker, here)
    return WorkerPlan(workers, per_worker, config.cpus_per_worker, max(1, share), waits)


def _workers(
    config: ClusterConfig, per_worker: float, here: Resources, reach: Resources
) -> int | tuple[int, int]:
    if config.workers != "auto":
        return config.workers
    if not per_worker:
        return 1
    if here.gpus >= per_worker:
        return int(here.gpus // per_worker)
    # All GPUs are still to come: begin with the first, and grow.
    return (1, max(1, int(reach.gpus // per_worker)))


def _fit(workers: int, gpus: float, cpus: float, there: Resources) -> bool:
    return workers * gpus <= there.gpus and workers * cpus <= there.cpus


def _gpus_per_worker(config: ClusterConfig, gpus: float) -> float:
    if config.gpus_per_worker != "auto":
        return config.gpus_per_worker
    return 1.0 if gpus else 0.0
