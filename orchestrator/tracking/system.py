"""A thread that samples what the machine is doing, under MLflow's names for it."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import psutil

_SECONDS = 10.0
_MEGABYTE = 1e6


class SystemSampler:
    """Emits a `system` event every few seconds while the block runs. A context manager."""

    def __init__(self, emit: Callable[..., None], seconds: float = _SECONDS) -> None:
        self._emit, self._seconds = emit, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._gpus = _open_gpus()

    def __enter__(self) -> "SystemSampler":
        psutil.cpu_percent()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join(timeout=self._seconds)

    def _run(self) -> None:
        while not self._done.wait(self._seconds):
            self._emit("system", **self.sample())

    def sample(self) -> dict[str, float]:
        """One reading."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            **_read_gpus(self._gpus),
        }


def _open_gpus() -> list[Any]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _read_gpus(handles: list[Any]) -> dict[str, float]:
    if not handles:
        return {}
    import pynvml

    readings: dict[str, float] = {}
    for number, handle in enumerate(handles):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        use = pynvml.nvmlDeviceGetUtilizationRates(handle)
        readings[f"gpu_{number}_memory_usage_megabytes"] = memory.used / _MEGABYTE
        readings[f"gpu_{number}_memory_usage_percentage"] = 100 * memory.used / memory.total
        readings[f"gpu_{number}_utilization_percentage"] = float(use.gpu)
    return readings
