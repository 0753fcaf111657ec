"""Where trials and the engine meet; the actor's class without its actor."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.sweep import desk
from orchestrator.sweep.desk import Answer, Desk
from orchestrator.training.membership import Member, Wishes

JOB: Any = SimpleNamespace()


def test_a_trial_that_goes_on_from_elsewhere_is_not_told_what_came_before() -> None:
    """PBT: it takes over a checkpoint of step 4 when it had been evaluated at step 8."""

    async def exploit() -> tuple[Answer, Answer, Answer]:
        desk, member = Desk(), Member(JOB, Path("a"), 4, None, 0)
        await desk.report("a", [{"step": 4}, {"step": 8}])
        before = await desk.ask("a", member, 0)
        moved = replace(member, fork=Path("b/checkpoints/step-00000004"), generation=1)
        at_once = await desk.ask("a", moved, 0)
        await desk.report("a", [{"step": 4}, {"step": 8, "new": True}])
        return before, at_once, await desk.ask("a", moved, 0)

    before, at_once, after = asyncio.run(exploit())
    assert before.report == {"step": 8}
    assert at_once == Answer()
    assert after.report == {"step": 8, "new": True}


def test_a_trial_that_says_nothing_for_long_loses_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its process may have died for good, and others wait."""
    monkeypatch.setattr(desk, "_SILENT_SECONDS", 0.1)
    member = Member(JOB, Path("a"))

    async def wait() -> tuple[Wishes, Wishes, Wishes]:
        there = Desk()
        await there.ask("a", member, 0)
        before = await there.wishes()
        await asyncio.sleep(0.2)
        silent = await there.wishes()
        await there.ask("a", member, 0)
        return before, silent, await there.wishes()

    before, silent, after = asyncio.run(wait())
    assert set(before.members) == set(after.members) == {"a"}
    assert not silent.members and silent.ended == {"a": "stopped"}
    assert not after.ended
