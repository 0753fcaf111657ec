"""The device a plan is for: the one at hand, or a GPU of which only the memory is known."""

from dataclasses import dataclass

from orchestrator.processor import has_bfloat16

# A process's CUDA context with its loaded kernels (torch, cuBLAS, bitsandbytes) and cuBLAS's
# workspace. An assumption: not measured on a GPU yet.
CUDA_CONTEXT = 2**29
# What the first step pages in on a CPU beyond the imports: code of the kernels, the compiled
# products of oneDNN, the model's classes. Measured on two Llama models, of 8 and of 30 layers.
CPU_RUNTIME = 100 * 2**20


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


def machine(gpu_memory: int | None, gpus: int | None) -> Machine:
    """The device to plan for.

    Args:
        gpu_memory: bytes of a GPU that need not be here; None takes the device at hand.
        gpus: their number; None takes what is here.
    """
    import torch

    here = torch.cuda.is_available()
    count = gpus or (torch.cuda.device_count() if here else 1)
    if gpu_memory is not None:
        return Machine(True, gpu_memory, CUDA_CONTEXT, count, True, False)
    if here:
        total = torch.cuda.get_device_properties(0).total_memory
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return Machine(True, total, CUDA_CONTEXT, count, fast, True)
    return _this_cpu(count)


def _this_cpu(count: int) -> Machine:
    """This process's share of the machine: what is free, and what the process holds already."""
    # What a run imports too belongs to what a process of ours holds.
    import bitsandbytes  # noqa: F401
    import psutil
    import transformers.quantizers.auto  # noqa: F401

    resident = psutil.Process().memory_info().rss
    free = psutil.virtual_memory().available
    return Machine(False, free + resident, resident + CPU_RUNTIME, count, has_bfloat16(), True)
