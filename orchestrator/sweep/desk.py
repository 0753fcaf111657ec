"""Where trials and the engine meet: an actor that knows who wants what and what came of it.

It is told the whole wish each time, so that whoever died and came back says it again and nothing
is lost: neither a trial, nor the engine, nor the desk itself has to remember the others.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from orchestrator.training.membership import Member, Wishes

# A trial that waits asks again every twenty seconds.
_SILENT_SECONDS = 180.0


@dataclass(frozen=True)
class Answer:
    """What became of a trial's wish. All empty: nothing yet, ask again.

    gone: why the engine is no more; the trial waits to be ended.
    """

    report: dict[str, Any] | None = None
    failure: str | None = None
    gone: bool = False


class Desk:
    """The actor's class; its methods run in one thread, waiting in between."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._ended: dict[str, str] = {}
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._failures: dict[str, str] = {}
        self._asked: dict[str, float] = {}
        self._closed = self._gone = False
        self._best: Path | None = None
        self._changed = asyncio.Condition()

    async def ask(self, name: str, member: Member, seconds: float) -> Answer:
        """Want a trial trained to its next evaluation; wait for it, at most so long."""
        if name not in self._failures:
            before = self._members.get(name)
            if before is not None and not member.goes_on(before):
                # It goes on from elsewhere: what came of it before is not what it waits for.
                self._reports.pop(name, None)
            self._members[name] = member
            self._asked[name] = asyncio.get_running_loop().time()
            self._ended.pop(name, None)
        await self._tell()
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while True:
            if name in self._failures:
                return Answer(failure=self._failures[name])
            for report in self._reports.get(name, []):
                if report["step"] > member.after:
                    return Answer(report=report)
            left = end - loop.time()
            if self._gone or left <= 0:
                return Answer(gone=self._gone)
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), left)
                except TimeoutError:
                    continue

    async def leave(self, name: str, status: str) -> None:
        """A trial is over."""
        if self._members.pop(name, None) is not None:
            self._ended[name] = status
        self._reports.pop(name, None)
        await self._tell()

    async def wishes(self) -> Wishes:
        """For the engine: what is wanted now."""
        now = asyncio.get_running_loop().time()
        for name in [n for n in self._members if now - self._asked[n] > _SILENT_SECONDS]:
            # Its process is dead, or it was paused; it says so if it still wants its place.
            del self._members[name]
            self._ended[name] = "stopped"
        unheard = tuple(name for name in self._members if name not in self._reports)
        return Wishes(dict(self._members), dict(self._ended), unheard, self._closed, self._best)

    async def report(self, name: str, results: list[dict[str, Any]]) -> None:
        """Of the engine: all that a trial's evaluations said so far."""
        self._reports[name] = results
        await self._tell()

    async def failed(self, name: str, error: str) -> None:
        """Of the engine: a trial cannot go on."""
        self._failures[name] = error
        self._members.pop(name, None)
        await self._tell()

    async def left(self, name: str) -> None:
        """Of the engine: a trial that was over is gone."""
        self._ended.pop(name, None)

    async def close(self, best: Path | None) -> None:
        """No more trials come: the engine ends, and proves the best trial's adapter."""
        self._closed, self._best = True, best
        await self._tell()

    async def engine_ended(self) -> None:
        """Nobody trains any more."""
        self._gone = True
        await self._tell()

    async def ready(self) -> bool:
        """Whether the actor runs."""
        return True

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def open_desk(places: int) -> Any:
    """Start the actor; each trial waits in a call of its own."""
    actor: Any = ray.remote(Desk)
    options = {"num_cpus": 0, "max_concurrency": 4 * places + 64, "max_restarts": 3}
    return actor.options(**options, max_task_retries=3).remote()
