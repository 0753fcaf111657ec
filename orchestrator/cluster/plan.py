"""How many workers a job gets, with what each. Pure arithmetic, no Ray."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config import ClusterConfig
from orchestrator.errors import RefusedError

# On the head of a cluster with an autoscaler: the nodes for workers that there may be at most.
MOST_VARIABLE = "ORCHESTRATOR_MAX_RESOURCES"
# Ray counts in ten-thousandths: a tenth of a GPU fits on it ten times.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs of a cluster."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"

    @property
    def named(self) -> dict[str, float]:
        """In Ray's words, without what there is none of."""
        named = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: amount for name, amount in named.items() if amount}

    def or_more(self, other: "Resources") -> "Resources":
        """The larger amount of each."""
        return Resources(max(self.cpus, other.cpus), max(self.gpus, other.gpus))


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
    def most(self) -> int:
        """Workers that the job has at most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def elastic(self) -> bool:
        """Whether the run goes on with fewer workers, and grows."""
        return not isinstance(self.workers, int)

    @property
    def resources(self) -> dict[str, float]:
        """Resources of one worker, in Ray's words."""
        return Resources(self.cpus, self.gpus).named


def told_nodes(text: str) -> tuple[Resources, ...]:
    """The nodes that a text such as `8xCPU=16,GPU=1` says: eight of 16 CPUs and a GPU each.

    Raises:
        RefusedError: it is of another form.
    """
    times, _, node = text.rpartition("x")
    try:
        count = int(times or 1)
        pairs = dict(part.split("=") for part in node.split(","))
        named = {name.strip(): float(amount) for name, amount in pairs.items()}
        if not named.keys() <= {"CPU", "GPU"} or min(named.values()) < 0 or count < 1:
            raise ValueError
    except ValueError:
        raise RefusedError(
            f"{MOST_VARIABLE}: {text!r} is not of the form 8xCPU=16,GPU=1, which stands for eight "
            "nodes of 16 CPUs and a GPU each"
        ) from None
    return (Resources(named.get("CPU", 0.0), named.get("GPU", 0.0)),) * count


def plan_workers(
    config: ClusterConfig, nodes: Sequence[Resources], most: Sequence[Resources] | None, own: bool
) -> WorkerPlan:
    """Workers for a cluster.

    Args:
        config: the job's `cluster` section.
        nodes: what each node of the cluster has now.
        most: the nodes to which its autoscaler may bring it; None where there is none.
        own: whether the cluster was started for this job alone; its workers then use all cores.

    Raises:
        RefusedError: the job asks for more than the cluster can ever have.
    """
    here, able_to_have = total(nodes), reach(nodes, most)
    worker = Resources(config.cpus_per_worker, _gpus_per_worker(config, able_to_have.gpus))
    workers = _workers(config, worker.gpus, nodes, most or ())
    least = workers if isinstance(workers, int) else workers[0]
    held, come = (places((n.named for n in some), worker.named) for some in (nodes, most or ()))
    able = max(held, come)
    if able < least:
        limit = f"whose nodes hold {held} of them"
        if most is not None:
            limit = (
                f"{able_to_have} with all that its autoscaler may add, whose nodes hold {able} of "
                "them"
            )
        raise RefusedError(
            f"cluster.workers: {least} workers of {worker} were asked for; the cluster has "
            f"{here}, {limit}"
        )
    # As many as start, of those that the cores are shared by; a cluster of our own never grows.
    at_once = least if isinstance(workers, int) else max(least, min(workers[1], held))
    if own and not isinstance(workers, int):
        workers = (least, at_once)
    share = int(here.cpus // at_once) if own else int(worker.cpus)
    return WorkerPlan(workers, worker.gpus, worker.cpus, max(1, share), held < least)


def total(nodes: Iterable[Resources]) -> Resources:
    """What nodes have in all."""
    listed = list(nodes)
    return Resources(sum(node.cpus for node in listed), sum(node.gpus for node in listed))


def reach(nodes: Iterable[Resources], most: Iterable[Resources] | None) -> Resources:
    """What a cluster has in all once its autoscaler, if there is one, has added what it may."""
    return total(nodes).or_more(total(most or ()))


def places(nodes: Iterable[Mapping[str, float]], worker: Mapping[str, float]) -> int:
    """How many workers nodes hold, each worker whole on one of them.

    Args:
        nodes: the resources of each, by Ray's names.
        worker: the resources of one worker.
    """
    return sum(
        min(int(node.get(name, 0.0) / amount + _ROUNDING) for name, amount in worker.items())
        for node in nodes
    )


def _workers(
    config: ClusterConfig, per_worker: float, nodes: Sequence[Resources], most: Sequence[Resources]
) -> int | tuple[int, int]:
    if config.workers != "auto":
        return config.workers
    if not per_worker:
        return 1
    gpus = {"GPU": per_worker}
    there = places((node.named for node in nodes), gpus)
    if there:
        return there
    # All GPUs are still to come: begin with the first, and grow.
    return (1, max(1, places((node.named for node in most), gpus)))


def _gpus_per_worker(config: ClusterConfig, gpus: float) -> float:
    if config.gpus_per_worker != "auto":
        return config.gpus_per_worker
    return 1.0 if gpus else 0.0
