"""A thread that samples what the machine is doing, under MLflow's names for it."""

import threading
from collections.abc import Callable
from typing import Any

import psutil

_SECONDS = 10.0
_MEGABYTE = 1e6


class SystemSampler:
    """Emits a `system` event every few seconds from `start` to `stop`. A context manager too."""

    def __init__(self, emit: Callable[..., Any], seconds: float = _SECONDS) -> None:
        self._emit, self._seconds = emit, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="system-sampler")
        self._gpus = _open_gpus()

    def start(self) -> None:
        """Begin in the background."""
        # The first reading compares with the last; this one only sets the mark.
        psutil.cpu_percent()
        self._thread.start()

    def stop(self) -> None:
        """End; nothing is emitted after."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> "SystemSampler":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._done.wait(self._seconds):
            try:
                self._emit("system", **self.sample())
            except OSError:
                # The disk is full: the training's own events say so, louder than this.
                return

    def sample(self) -> dict[str, float]:
        """One reading."""
        memory, disk, network = (
            psutil.virtual_memory(),
            psutil.disk_usage("/"),
            psutil.net_io_counters(),
        )
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / _MEGABYTE,
            "network_receive_megabytes": network.bytes_recv / _MEGABYTE,
            "network_transmit_megabytes": network.bytes_sent / _MEGABYTE,
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
    readings: dict[str, float] = {}
    for number, handle in enumerate(handles):
        readings.update({f"gpu_{number}_{k}": value for k, value in _read_gpu(handle).items()})
    return readings


def _read_gpu(handle: Any) -> dict[str, float]:
    """What this GPU tells; a virtual or divided one keeps some figures to itself."""
    import pynvml

    readings: dict[str, float] = {}
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        readings["memory_usage_megabytes"] = memory.used / _MEGABYTE
        readings["memory_usage_percentage"] = 100 * memory.used / memory.total
        readings["utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        readings["power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    except pynvml.NVMLError:
        return readings
    return readings
