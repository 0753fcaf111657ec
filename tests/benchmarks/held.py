"""What the processes that train hold together, watched from outside."""

import threading
from collections.abc import Iterator

import psutil

_LOOK_SECONDS = 1.0
# Ray's names for workers of ours and for Tune's trials.
_TRAINING = ("ray::RayTrainWorker", "ray::ImplicitFunc")


class Held:
    """The most bytes that this process's trainers hold at a time, shared pages counted once.

    Looked at once a second: each look takes of the time of what it watches. A context manager;
    `peak` is whole when it is left.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Held":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._done.wait(_LOOK_SECONDS):
            self.peak = max(self.peak, sum(_sizes()))


def _sizes() -> Iterator[int]:
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(_TRAINING):
                yield int(process.memory_full_info().pss)
        except psutil.NoSuchProcess:
            continue
