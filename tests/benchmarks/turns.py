"""Runs that train by turns on one machine, whose speed drifts: the others stand still meanwhile."""

import signal
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.material import finish, journal

# What stood still has much to catch up with; steps that begin in these first seconds do not count.
_SETTLE_SECONDS = 4.0
# The counted steps of each run take at least so long in a turn.
_TURN_SECONDS = 12.0
_LOOK_SECONDS = 0.1
_END_SECONDS = 120


@dataclass(frozen=True)
class Run:
    """A command that trains for longer than it is measured, and its folder."""

    process: Any
    folder: Path

    def steps(self) -> list[dict[str, Any]]:
        """The journal's steps so far."""
        return [event for event in journal(self.folder) if event["event"] == "step"]

    def reach(self, count: int) -> None:
        """Wait until it has done so many steps.

        Raises:
            SystemExit: it ended before.
        """
        while len(self.steps()) < count:
            if self.process.poll() is not None:
                finish(self.process)
                raise SystemExit(f"{self.process.args} ended before its time")
            time.sleep(_LOOK_SECONDS)

    def rate(self, counts_from: float) -> float:
        """Tokens per second of the steps that begin at a time or later, when they are enough."""
        while True:
            steps = [s for s in self.steps() if s["time"] - s["seconds"] >= counts_from]
            seconds = sum(step["seconds"] for step in steps)
            if seconds >= _TURN_SECONDS:
                return sum(step["tokens"] for step in steps) / seconds
            self.reach(len(self.steps()) + 1)

    def pause(self) -> None:
        """Stand still, with every process that it has started."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on."""
        self._send(signal.SIGCONT)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        """End it with all it has started, whether it stands still or not."""
        self.resume()
        self.process.terminate()
        try:
            self.process.communicate(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._send(signal.SIGKILL)
            self.process.communicate()

    def _send(self, number: int) -> None:
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            for process in [*own.children(recursive=True), own]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def by_turns(contestants: Mapping[str, Sequence[Run]], rounds: int) -> dict[str, list[float]]:
    """Let each contestant train in its turn; all stand still before and after.

    Args:
        contestants: one run, or several that train beside one another.
        rounds: turns of each.

    Returns:
        Tokens per second of each turn, the sum of a contestant's runs.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, runs in contestants.items():
            for run in runs:
                run.resume()
            counts_from = time.time() + _SETTLE_SECONDS
            # Who is done first goes on beside the others.
            rate = sum(run.rate(counts_from) for run in runs)
            for run in runs:
                run.pause()
            rates[name].append(rate)
    return rates


def ratio(rates: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Median over the rounds of a contestant's speed over another's."""
    return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))
