"""Who trains over a base: the words between a host and those who want adapters trained."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError


@dataclass(frozen=True)
class Member:
    """An adapter that someone wants trained.

    after: steps of which the evaluations were heard; training goes on to the next one.
    fork: a checkpoint folder of another adapter to go on from, in place of its own.
    generation: another one whenever its job or fork changes.
    """

    job: JobConfig
    folder: Path
    after: int = -1
    fork: Path | None = None
    generation: int = 0

    @property
    def origin(self) -> str | None:
        """Tells one fork from another, also where both are from one checkpoint."""
        return None if self.fork is None else f"{self.fork}@{self.generation}"

    def goes_on(self, before: "Member") -> bool:
        """Whether the same is wanted as before, if further."""
        return replace(self, after=before.after) == before


@dataclass(frozen=True)
class Wishes:
    """What is wanted now.

    ended: how members end, by name. unheard: members of whose evaluations nothing is known, since
    who asks has forgotten it. closed: no more come. best: the folder of the best of all. version:
    another one whenever anything changes. error: why none goes on any more.
    """

    members: Mapping[str, Member]
    ended: Mapping[str, str]
    unheard: tuple[str, ...] = ()
    closed: bool = False
    best: Path | None = None
    version: int = 0
    error: OrchestratorError | None = None


class Membership(Protocol):
    """Who joins and who leaves; only the leader asks and reports."""

    def wishes(self, holds: Collection[str]) -> Wishes:
        """What is wanted now, of a host that has these members."""

    def report(self, name: str, results: list[dict[str, Any]]) -> None:
        """All that a member's evaluations said so far."""

    def failed(self, name: str, error: str) -> None:
        """A member cannot go on; the others do."""

    def observe(self, folder: Path) -> Any:
        """An observer of one member's events, to be closed when it leaves."""

    def pause(self) -> None:
        """Nobody has anything to train: wait a little, or for another wish."""
