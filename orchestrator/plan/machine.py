"""The device a plan is for: the one at hand, or a GPU of which only the memory is known."""

import json
import subprocess
import sys
from dataclasses import dataclass

from orchestrator.imports import import_bitsandbytes
from orchestrator.plan.limits import free_bytes
from orchestrator.processor import has_bfloat16

# A process's CUDA context with its loaded kernels (torch, cuBLAS, bitsandbytes) and cuBLAS's
# workspace. An assumption: not measured on a GPU yet.
CUDA_CONTEXT = 2**29
# What the first step pages in on a CPU beyond the imports: code of the kernels, the model's
# classes. 30 to 50 MiB in two Llama models of 8 layers.
CPU_RUNTIME = 48 * 2**20
_LOOK_SECONDS = 120
_LOOK = (
    "import json; from orchestrator.plan.machine import describe_gpu; gpu = describe_gpu();"
    "print(json.dumps(gpu and vars(gpu)))"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU as a process finds it.

    free: bytes that are left to the workers of one run, contexts included. total: all it has.
    bfloat16: whether it multiplies bfloat16 numbers.
    """

    free: int
    total: int
    bfloat16: bool


@dataclass(frozen=True)
class Machine:
    """A device: its memory in bytes, what the framework takes of it, and how many there are.

    processes: of a run that share it where it is a CPU, of which each has so much memory.
    """

    cuda: bool
    memory: int
    overhead: int
    gpus: int
    bfloat16: bool
    at_hand: bool
    processes: int = 1

    @property
    def round_up(self) -> int:
        """The allocator's step: torch's CUDA allocator hands out multiples of 512 bytes."""
        return 512 if self.cuda else 64


def machine(
    gpu_memory: int | None,
    gpus: int | None,
    cuda: bool | None = None,
    sharing: int = 1,
    processes: int = 1,
    gpu: Gpu | None = None,
) -> Machine:
    """The device to plan for.

    Args:
        gpu_memory: bytes of a GPU that need not be here; None takes the device at hand.
        gpus: their number; None takes what is here.
        cuda: whether to train on the GPU at hand; None takes it where there is one.
        sharing: parts that a GPU is divided into, of whatever jobs.
        processes: of this run that share the device, this one included.
        gpu: the GPU to train on where another process has looked at it; None looks here.
    """
    import torch

    here = torch.cuda.is_available() if cuda is None else cuda
    count = gpus or (max(1, torch.cuda.device_count()) if here else 1)
    if gpu_memory is not None:
        return Machine(True, gpu_memory // sharing, CUDA_CONTEXT, count, True, False)
    if not here:
        return _this_cpu(count, processes)
    found = gpu or describe_gpu(processes)
    assert found is not None, "whoever asks for a GPU has one"
    # Others' parts are gone from what is free already; what is free, this run's workers share.
    memory = min(found.free // processes, found.total // sharing)
    return Machine(True, memory, CUDA_CONTEXT, count, found.bfloat16, gpu is None)


def describe_gpu(processes: int = 1) -> Gpu | None:
    """This process's GPU, in a look that leaves a context on it; None where it has none.

    Args:
        processes: of the run that are on this GPU by now, this one included.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    allowed = int(torch.cuda.get_per_process_memory_fraction() * total)
    free = min(free + torch.cuda.memory_reserved(), processes * allowed)
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    # The contexts are there already, and no longer free.
    return Gpu(free + processes * CUDA_CONTEXT, total, fast)


def look_at_gpu() -> Gpu | None:
    """As `describe_gpu` from a process that ends with its look.

    A context of a process that trains nothing would take memory from those that do.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    command = [sys.executable, "-c", _LOOK]
    try:
        looked = subprocess.run(
            command, capture_output=True, text=True, timeout=_LOOK_SECONDS, check=True
        )
    except subprocess.SubprocessError:
        return None
    found = json.loads(looked.stdout)
    return found and Gpu(**found)


def _this_cpu(count: int, sharing: int) -> Machine:
    """This process's share of the machine: what is free, and what the process holds already."""
    # What a run imports too belongs to what a process of ours holds.
    import_bitsandbytes()
    import psutil
    import transformers.quantizers.auto  # noqa: F401

    resident = psutil.Process().memory_info().rss
    memory = free_bytes(sharing) + resident
    return Machine(False, memory, resident + CPU_RUNTIME, count, has_bfloat16(), True, sharing)
