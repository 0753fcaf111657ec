"""What workers say to one another; a single process says it to itself."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Before a group is formed: its functions keep the default group of that moment as their default
# argument, and with it gloo's threads, which would outlive the group and abort a process that ends.
import torch.distributed.nn.functional
from torch import Tensor

from orchestrator.errors import OrchestratorError, RefusedError, WorkerLostError, first_line

# Quantizing a very large base is the longest that workers wait for one of them.
_LONGEST_PART = timedelta(hours=4)


class World:
    """This process among `size` equal ones.

    Attributes:
        nodes: machines the workers run on.
        beside: workers on this one's device, itself included.
        waited: seconds spent in `sum` so far, waiting for slower workers included.
        ask: flags of this worker that travel with every `sum`. A collective of their own would
            cost a trip around all workers; see `take_answers`.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        nodes: int = 1,
        tensors: Any = None,
        beside: int | None = None,
    ) -> None:
        """Of torch's default process group.

        Args:
            rank: this process's place.
            size: number of processes.
            nodes: machines they run on.
            tensors: the group that sums tensors on their device; None is the default group.
            beside: processes on this one's device; None: as many on each node.
        """
        self.rank, self.size, self.nodes = rank, size, nodes
        self._tensors = tensors
        self.beside = beside or -(-size // nodes)
        self.waited = 0.0
        self.ask: Callable[[], Sequence[bool]] = tuple
        self._answers: list[bool] = []

    def alone(self) -> "World":
        """This process as one that works without the others, beside them on its device."""
        return World(beside=self.beside)

    def part(self) -> None:
        """Leave the group for good, as all others do, with the threads and memory it takes."""
        dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process writes journal, checkpoints and adapter."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all workers, in place, in one collective of float32.

        Raises:
            WorkerLostError: a worker died or is silent for longer than the group's timeout.
        """
        asked = [float(flag) for flag in self.ask()]
        if self.size == 1:
            self._hear(asked)
            return
        flags = torch.tensor(asked, dtype=torch.float32, device=tensors[0].device)
        flat = torch.cat([*(t.reshape(-1).to(torch.float32) for t in tensors), flags])
        if flat.is_cuda:
            # What this worker still computes itself is no wait for the others.
            torch.cuda.synchronize(flat.device)
        began = time.perf_counter()
        with _others_may_be_lost():
            dist.all_reduce(flat, group=self._tensors)
            if flat.is_cuda:
                # Kernels run on; only here does the wait for the others end.
                torch.cuda.synchronize(flat.device)
        self.waited += time.perf_counter() - began
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()
        self._hear(flat[start:].tolist())

    def take_answers(self) -> list[bool]:
        """For each flag of `ask` whether it was set on any worker in a `sum` since the last call.

        All workers hear the same; nothing where there was no such sum.
        """
        answers, self._answers = self._answers, []
        return answers

    def _hear(self, counts: list[float]) -> None:
        before = self._answers or [False] * len(counts)
        self._answers = [old or count > 0 for old, count in zip(before, counts, strict=True)]

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set on any worker; all hear the same answer.

        Raises:
            WorkerLostError: as `sum`.
        """
        if self.size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        with _others_may_be_lost():
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def least(self, value: int) -> int:
        """The least of all workers' values.

        Raises:
            WorkerLostError: as `sum`.
        """
        if self.size == 1:
            return value
        found = torch.tensor([value])
        with _others_may_be_lost():
            dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return int(found.item())

    def from_leader(self, value: Any) -> Any:
        """The leader's value, on every worker.

        Raises:
            WorkerLostError: as `sum`.
        """
        if self.size == 1:
            return value
        values = [value]
        with _others_may_be_lost():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A part of the work that may take hours and may be refused on any worker.

        All leave it when the last has done it, with the same outcome.

        Raises:
            OrchestratorError: the first that a worker raised, by rank.
            WorkerLostError: a worker died.
        """
        error: OrchestratorError | None = None
        try:
            yield
        except OrchestratorError as raised:
            error = raised
        if self.size > 1:
            errors: list[OrchestratorError | None] = [None] * self.size
            with _others_may_be_lost():
                dist.monitored_barrier(timeout=_LONGEST_PART)
                dist.all_gather_object(errors, error)
            error = next((found for found in errors if found is not None), None)
        if error is not None:
            raise error


def join(rank: int, size: int, device: torch.device, node: str, timeout: float) -> World:
    """Meet the others of torch's default process group; on GPUs tensors are summed by NCCL.

    One alone leaves its group: gloo's thread would interrupt every step a hundred times a second.

    Args:
        rank: this process's place.
        size: number of processes.
        device: what this process trains on.
        node: the machine it runs on, by whatever name.
        timeout: seconds of silence after which NCCL counts a worker as dead.

    Raises:
        RefusedError: some train on a GPU and some do not.
        WorkerLostError: a worker died or is silent for longer than the group's timeout.
    """
    if size == 1:
        if dist.is_initialized():
            dist.destroy_process_group()
        return World()
    found: list[Any] = [None] * size
    tensors = None
    with _others_may_be_lost():
        own = (device.type, node, _gpu(device))
        dist.all_gather_object(found, own)
        kinds = {kind for kind, *_ in found}
        # NCCL takes no GPU twice; workers that share one sum through gloo.
        if kinds == {"cuda"} and len(set(found)) == size:
            tensors = dist.new_group(backend="nccl", timeout=timedelta(seconds=timeout))
            # It connects with its first sum, and takes memory of which the plan is to know.
            dist.all_reduce(torch.zeros(1, device=device), group=tensors)
            torch.cuda.synchronize(device)
    if len(kinds) > 1:
        raise RefusedError(
            "cluster.gpus_per_worker: some workers see a GPU and some do not; Ray's GPUs must be "
            "real on all nodes or on none"
        )
    nodes = len({name for _, name, _ in found})
    return World(rank, size, nodes, tensors, found.count(own))


def _gpu(device: torch.device) -> str:
    """What tells this GPU from others; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


@contextmanager
def _others_may_be_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Gloo and NCCL have no class of their own for a peer that is gone or silent.
        raise WorkerLostError(f"Another worker died or hangs: {first_line(error)}") from error
