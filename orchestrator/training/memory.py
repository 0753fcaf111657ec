"""Memory of this process: settings that pay, and what is used."""

import ctypes
import gc
import platform
import resource
from pathlib import Path

import psutil
import torch

from orchestrator.plan.heap import MAPPED_BYTES

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30
_RETURNED_BYTES = 1 << 20
# Of torch's allocator for the CPU, of C++, and of CUDA's libraries.
_NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "ALLOC_FAILED", "out of memory")


def return_freed_memory() -> None:
    """Let glibc return every large block to the kernel once it is freed.

    For work of which little stays, such as quantizing: by default glibc soon takes blocks of up to
    32 MiB from its heap, where what stays keeps the rest from being returned.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _RETURNED_BYTES)


def keep_freed_memory() -> None:
    """Let glibc hand freed blocks out again instead of returning them to the kernel.

    On a CPU every activation is freed and allocated again in each layer; without this the kernel
    zeroes the same pages again and again: some 5% of a step on two cores. The largest blocks are
    few, and returned: they would leave holes that nothing fits.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left; on a CPU torch has no class for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_MEMORY)


def release_cached(device: torch.device) -> None:
    """Give back to the system what is free but kept, so that other sizes of blocks find room."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak(device: torch.device) -> None:
    """Start measuring the peak afresh, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + _paged_bytes()
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def used_bytes(device: torch.device) -> int:
    """Bytes in use now: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) + _paged_bytes()
    return psutil.Process().memory_info().rss


def _paged_bytes() -> int:
    """Bytes of paged optimizers' state, which torch's allocator knows nothing of."""
    from bitsandbytes.functional import GlobalPageManager

    return sum(tensor.nbytes for tensor in GlobalPageManager.get_instance().paged_tensors)
