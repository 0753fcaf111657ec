"""Settings of the C library's heap that a process takes from its environment when it starts.

glibc's `posix_memalign`, which gives torch its blocks on a CPU, cuts each from a larger piece. The
leftovers, some 100 bytes on both sides, go to the thread's cache of small blocks, and what lies
there never joins its neighbours again. So a freed block serves no request of its own size, and the
heap grows: to 418 MiB where 207 were in use, in three steps of SmolLM2-135M with checkpointing.
"""

import os
import platform
import sys

# Ray Train trains in a thread. A thread's own heap would return large blocks to the kernel whatever
# `training/memory.py` asks for: five times the page faults.
SETTINGS = {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


def restart_with_settings() -> None:
    """Start this very command again with the settings, unless it has them or the user's own."""
    missing = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    if missing and platform.libc_ver()[0] == "glibc":
        os.environ.update(missing)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
