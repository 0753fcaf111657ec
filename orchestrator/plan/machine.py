"""The device a plan is for: the one at hand, or a GPU of which only the memory is known."""

from dataclasses import dataclass

from orchestrator.plan.limits import free_bytes
from orchestrator.processor import has_bfloat16

# A process's CUDA context with its loaded kernels (torch, cuBLAS, bitsandbytes) and cuBLAS's
# workspace. An assumption: not measured on a GPU yet.
CUDA_CONTEXT = 2**29
# What the first step pages in on a CPU beyond the imports: code of the kernels, the compiled
# products of oneDNN, the model's classes. 30 to 50 MiB in two Llama models of 8 layers.
CPU_RUNTIME = 48 * 2**20


@dataclass(frozen=True)
class Machine:
    """A device: its memory in bytes, what the framework takes of it, and how many there are."""

    cuda: bool
    memory: int
    overhead: int
    gpus: int
    bfloat16: bool
    at_hand: bool

    @property
    def round_up(self) -> int:
        """The allocator's step: torch's CUDA allocator hands out multiples of 512 bytes."""
        return 512 if self.cuda else 64


def machine(
    gpu_memory: int | None, gpus: int | None, cuda: bool | None = None, sharing: int = 1
) -> Machine:
    """The device to plan for.

    Args:
        gpu_memory: bytes of a GPU that need not be here; None takes the device at hand.
        gpus: their number; None takes what is here.
        cuda: whether to train on the GPU at hand; None takes it where there is one.
        sharing: processes of the job that share a device.
    """
    import torch

    here = torch.cuda.is_available() if cuda is None else cuda
    count = gpus or (torch.cuda.device_count() if here else 1)
    if gpu_memory is not None:
        return Machine(True, gpu_memory // sharing, CUDA_CONTEXT, count, True, False)
    return _this_gpu(count, sharing) if here else _this_cpu(count, sharing)


def _this_gpu(count: int, sharing: int) -> Machine:
    """What is free of the present GPU, and what this process holds of it already."""
    import torch

    free, total = torch.cuda.mem_get_info()
    allowed = int(torch.cuda.get_per_process_memory_fraction() * total)
    memory = min(free + torch.cuda.memory_reserved(), allowed) // sharing
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    # The context of this process is there already, and no longer free.
    return Machine(True, memory + CUDA_CONTEXT, CUDA_CONTEXT, count, fast, True)


def _this_cpu(count: int, sharing: int) -> Machine:
    """This process's share of the machine: what is free, and what the process holds already."""
    # What a run imports too belongs to what a process of ours holds.
    import bitsandbytes  # noqa: F401
    import psutil
    import transformers.quantizers.auto  # noqa: F401

    resident = psutil.Process().memory_info().rss
    memory = free_bytes(sharing) + resident
    return Machine(False, memory, resident + CPU_RUNTIME, count, has_bfloat16(), True)
