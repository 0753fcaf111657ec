"""Settings of its allocators that a process takes from its environment when it starts.

glibc's `posix_memalign`, which gives torch its blocks on a CPU, cuts each from a larger piece. The
leftovers, some 100 bytes on both sides, go to the thread's cache of small blocks, and what lies
there never joins its neighbours again. So a freed block serves no request of its own size, and the
heap grows: to 418 MiB where 207 were in use, in three steps of SmolLM2-135M with checkpointing.
"""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

_TUNABLES, _NO_CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"
# Ray Train trains in a thread. A thread's own heap would return large blocks to the kernel whatever
# `training/memory.py` asks for: five times the page faults.
_ARENAS = "MALLOC_ARENA_MAX"
_NVIDIA = Path("/dev/nvidiactl")
# Rows differ in every step, and torch's blocks on a GPU would fit none of the next ones: segments
# that grow leave fewer holes. See "Optimizing memory usage" in torch's notes on CUDA.
_SEGMENTS, _GROWING = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
_SEGMENTS_OF_OLD = "PYTORCH_CUDA_ALLOC_CONF"


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What a process that trains on a CPU wants beside what its environment says already."""
    found = {} if _ARENAS in environment else {_ARENAS: "1"}
    tunables = environment.get(_TUNABLES, "")
    if _NO_CACHE not in tunables:
        found[_TUNABLES] = ":".join(filter(None, [tunables, f"{_NO_CACHE}=0"]))
    return found


def gpu_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What a process that trains on a GPU wants, where its environment says nothing of it."""
    told = environment.keys() & {_SEGMENTS, _SEGMENTS_OF_OLD}
    return {} if told else {_SEGMENTS: _GROWING}


def restart_with_settings() -> None:
    """Start this very command again with the settings, where it trains on a CPU without them.

    Not under a debugger, which would lose it. On a GPU torch reads its settings later.
    """
    if _NVIDIA.exists():
        os.environ.update(gpu_settings(os.environ))
        return
    wanted = settings(os.environ)
    alone = platform.libc_ver()[0] == "glibc" and sys.gettrace() is None
    if wanted and alone and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})
