"""Where trials and engines meet: an actor that knows who wants what and what came of it.

It is told the whole wish each time, so that whoever died and came back says it again and nothing
is lost: neither a trial, nor an engine, nor the desk itself has to remember the others.
"""

import asyncio
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from orchestrator.errors import OrchestratorError
from orchestrator.training.membership import Member, Wishes

# A trial that waits asks again every twenty seconds.
_SILENT_SECONDS = 180.0


@dataclass(frozen=True)
class Answer:
    """What became of a trial's wish. All empty: nothing yet, ask again.

    gone: the engine is no more; the trial waits to be ended.
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
        self._error: OrchestratorError | None = None
        # Which engine trains a member, or is about to, until that engine has let it go.
        self._engine_of: dict[str, int] = {}
        # Engines that have said what they hold, of so many.
        self._heard: set[int] = set()
        self._engines = 1
        self._version = 0
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
        self._end(name, status)
        self._reports.pop(name, None)
        await self._tell()

    async def wishes(
        self, engine: int, engines: int, places: int, holds: Collection[str]
    ) -> Wishes:
        """For an engine: what is wanted of it now.

        Args:
            engine: its number.
            engines: how many there are.
            places: members that each of them trains at a time, at most.
            holds: members that it has now.
        """
        now = asyncio.get_running_loop().time()
        for name in [n for n in self._members if now - self._asked[n] > _SILENT_SECONDS]:
            # Its process is dead, or it was paused; it says so if it still wants its place.
            self._end(name, "stopped")
        self._hear(engine, engines, holds)
        self._place(places)
        mine = {name for name, place in self._engine_of.items() if place == engine}
        members = {name: member for name, member in self._members.items() if name in mine}
        ended = {name: status for name, status in self._ended.items() if name in mine}
        unheard = tuple(name for name in members if name not in self._reports)
        return Wishes(members, ended, unheard, self._closed, self._best, self._version, self._error)

    async def changed(self, version: int, seconds: float) -> None:
        """For an engine that has nothing to do: wait for other wishes than of a version."""
        async with self._changed:
            waiting = self._changed.wait_for(lambda: self._version != version)
            with suppress(TimeoutError):
                await asyncio.wait_for(waiting, seconds)

    async def report(self, name: str, results: list[dict[str, Any]]) -> None:
        """Of the engine: all that a trial's evaluations said so far."""
        self._reports[name] = results
        await self._tell()

    async def failed(self, name: str, error: str) -> None:
        """Of the engine: a trial cannot go on."""
        self._failures[name] = error
        self._members.pop(name, None)
        self._engine_of.pop(name, None)
        await self._tell()

    async def broken(self, error: OrchestratorError) -> None:
        """Of an engine: it cannot go on, and nobody else trains what it holds."""
        self._error = error
        await self._tell()

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

    def _end(self, name: str, status: str) -> None:
        if self._members.pop(name, None) is not None and name in self._engine_of:
            self._ended[name] = status

    def _hear(self, engine: int, engines: int, holds: Collection[str]) -> None:
        if engines != self._engines:
            # All of them began anew.
            self._engines, self._engine_of, self._ended = engines, {}, {}
            self._heard = set()
        self._heard.add(engine)
        self._engine_of |= dict.fromkeys(holds, engine)
        wanted = {*holds, *self._members}
        for name in [n for n, place in self._engine_of.items() if place == engine]:
            if name not in wanted:
                # It was over, and has been let go.
                del self._engine_of[name]
                self._ended.pop(name, None)

    def _place(self, places: int) -> None:
        """Give members without an engine to the one that has the fewest.

        Not before all have said what they hold: a desk that has died and come back would give a
        member to a second one.
        """
        if len(self._heard) < self._engines:
            return
        # Who is over is let go before another is let in.
        loads = Counter(self._engine_of[name] for name in self._members if name in self._engine_of)
        for name in [n for n in self._members if n not in self._engine_of]:
            engine = min(range(self._engines), key=lambda place: loads[place])
            if loads[engine] < places:
                self._engine_of[name] = engine
                loads[engine] += 1

    async def _tell(self) -> None:
        self._version += 1
        async with self._changed:
            self._changed.notify_all()


def open_desk(places: int) -> Any:
    """Start the actor; each trial waits in a call of its own."""
    actor: Any = ray.remote(Desk)
    options = {"num_cpus": 0, "max_concurrency": 4 * places + 64, "max_restarts": 3}
    return actor.options(**options, max_task_retries=3).remote()
