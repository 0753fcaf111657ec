"""Runs that train by turns on one machine, whose speed drifts: the others stand still meanwhile."""

import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.material import finish, journal

# Steps of each run that count in a turn, after one that it was stopped in the midst of.
STEPS = 3


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
            time.sleep(0.05)

    def pause(self) -> None:
        """Stand still, with every process that it has started."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on."""
        self._send(signal.SIGCONT)

    def end(self) -> None:
        """Go on to the next checkpoint, and end."""
        self.resume()
        self.process.terminate()
        self.process.communicate()

    def _send(self, number: int) -> None:
        own = psutil.Process(self.process.pid)
        for process in [own, *own.children(recursive=True)]:
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
            before = [len(run.steps()) for run in runs]
            for run in runs:
                run.resume()
            # Who is done first goes on beside the others.
            for run, done in zip(runs, before, strict=True):
                run.reach(done + 1 + STEPS)
            for run in runs:
                run.pause()
            counted = [
                run.steps()[done + 1 : done + 1 + STEPS]
                for run, done in zip(runs, before, strict=True)
            ]
            rates[name].append(sum(map(_rate, counted)))
    return rates


def ratio(rates: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Median over the rounds of a contestant's speed over another's."""
    return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))


def _rate(steps: Sequence[dict[str, Any]]) -> float:
    return sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)
