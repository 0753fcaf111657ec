"""What workers say to one another; a single process says it to itself."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among `size` equal ones."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes journal, checkpoints and adapter."""
        return self.rank == 0

    def sum(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over all workers, in place, in one collective."""
        if self.size == 1:
            return
        flat = torch.cat([t.reshape(-1).to(torch.float32) for t in tensors])
        dist.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any worker; all hear the same answer."""
        if self.size == 1:
            return flag
        votes = torch.tensor([float(flag)], device=device)
        self.sum([votes])
        return bool(votes.item())
