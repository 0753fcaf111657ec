"""Priorities of the processes beside a worker that computes on the CPU.

Ray's own wake a hundred times a second each, and a product that several threads share ends with the
one that was interrupted. With all of them stopped such products were 5 to 9% faster on two cores;
at the lowest priority, where they take the gaps that training leaves, 2 to 6%.
"""

import os
import sys
from contextlib import suppress

import psutil

_LOWEST = 19
# Workers compute, and trials, by Tune's name for them, import while others compute. Who has no name
# yet may become either.
_BUSY = ("ray::RayTrainWorker", "ray::ResourceTrainable", "ray::IDLE")
# What Ray's processes are started from or called; the command may have other children.
_OF_RAY = ("ray::", "/ray/")


def let_ray_wait() -> None:
    """Called by a worker: the other processes of its Ray go last, those that compute excepted.

    For a Ray that serves one command only. The raylet stays as it is: workers to come inherit its
    priority, and only root may raise it again.
    """
    raylet = psutil.Process().parent()
    starter = raylet and raylet.parent()
    if raylet is None or starter is None:
        return
    for process in [*raylet.children(), *starter.children()]:
        # Of one that is gone by now, or another user's, there is nothing to know.
        with suppress(psutil.Error):
            if process.pid != raylet.pid and _waits(process):
                go_last(process)


def go_last(process: psutil.Process) -> None:
    """Give a process the lowest priority; on Linux only, where each of its threads has its own."""
    if sys.platform != "linux":
        return
    for thread in process.threads():
        with suppress(ProcessLookupError, PermissionError):
            os.setpriority(os.PRIO_PROCESS, thread.id, _LOWEST)


def _waits(process: psutil.Process) -> bool:
    title = " ".join(process.cmdline())
    busy = title.startswith(_BUSY) or "default_worker.py" in title
    return not busy and any(word in title for word in _OF_RAY)
