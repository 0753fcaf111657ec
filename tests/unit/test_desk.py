"""Where trials and the engine meet; the actor's class without its actor."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import OrchestratorError
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
        before = await there.wishes(0, 1, 4, ())
        await asyncio.sleep(0.2)
        silent = await there.wishes(0, 1, 4, ("a",))
        await there.ask("a", member, 0)
        return before, silent, await there.wishes(0, 1, 4, ())

    before, silent, after = asyncio.run(wait())
    assert set(before.members) == set(after.members) == {"a"}
    assert not silent.members and silent.ended == {"a": "stopped"}
    assert not after.ended


async def _asked(*names: str) -> Desk:
    there = Desk()
    for name in names:
        await there.ask(name, Member(JOB, Path(name)), 0)
    return there


def test_each_engine_gets_its_part_once_all_have_said_what_they_hold() -> None:
    async def three() -> list[set[str]]:
        there = await _asked("a", "b", "c")
        found = [await there.wishes(engine, 2, 2, ()) for engine in (0, 1, 0, 1)]
        return [set(wishes.members) for wishes in found]

    early, *later = asyncio.run(three())
    assert not early
    assert later == [{"b"}, {"a", "c"}, {"b"}]


def test_a_member_stays_with_its_engine_until_it_was_let_go() -> None:
    """It would be trained by two at once."""

    async def leave_and_come_back() -> list[Wishes]:
        there = await _asked("a", "b")
        for engine in (1, 0, 1):
            await there.wishes(engine, 2, 1, ())
        await there.leave("a", "stopped")
        leaving = await there.wishes(0, 2, 1, ("a",))
        # The other one has room by now.
        await there.leave("b", "stopped")
        await there.wishes(1, 2, 1, ())
        await there.ask("a", Member(JOB, Path("a")), 0)
        other = await there.wishes(1, 2, 1, ())
        back = await there.wishes(0, 2, 1, ("a",))
        await there.leave("a", "stopped")
        await there.wishes(0, 2, 1, ())
        await there.ask("c", Member(JOB, Path("c")), 0)
        return [leaving, other, back, await there.wishes(0, 2, 1, ())]

    leaving, other, back, freed = asyncio.run(leave_and_come_back())
    assert not leaving.members and leaving.ended == {"a": "stopped"}
    assert not other.members and not other.ended
    assert set(back.members) == {"a"} and not back.ended
    assert set(freed.members) == {"c"} and not freed.ended


def test_a_place_is_given_while_who_had_it_leaves() -> None:
    """The engine lets go before it lets in, and need not ask twice."""

    async def next_one() -> Wishes:
        there = await _asked("a")
        await there.wishes(0, 1, 1, ())
        await there.leave("a", "finished")
        await there.ask("b", Member(JOB, Path("b")), 0)
        return await there.wishes(0, 1, 1, ("a",))

    wishes = asyncio.run(next_one())
    assert set(wishes.members) == {"b"} and wishes.ended == {"a": "finished"}


def test_a_desk_that_came_back_gives_no_member_to_a_second_engine() -> None:
    async def again() -> list[set[str]]:
        there = await _asked("a", "b")
        return [
            set((await there.wishes(engine, 2, 2, holds)).members)
            for engine, holds in ((0, ()), (1, ("a", "b")), (0, ()), (1, ("a", "b")))
        ]

    assert asyncio.run(again()) == [set(), {"a", "b"}, set(), {"a", "b"}]


def test_other_engines_after_a_restart_share_all_anew() -> None:
    async def fewer() -> list[set[str]]:
        there = await _asked("a", "b")
        for engine in (0, 1, 0):
            await there.wishes(engine, 2, 1, ())
        return [set((await there.wishes(0, 1, 2, ())).members)]

    assert asyncio.run(fewer()) == [{"a", "b"}]


def test_an_engine_without_work_is_woken_by_a_wish() -> None:
    async def woken() -> float:
        there, loop = Desk(), asyncio.get_running_loop()
        version = (await there.wishes(0, 1, 1, ())).version
        began = loop.time()
        waiting = asyncio.ensure_future(there.changed(version, 60.0))
        await there.ask("a", Member(JOB, Path("a")), 0)
        await waiting
        # It has changed since: nothing is waited for.
        await there.changed(version, 60.0)
        return loop.time() - began

    assert asyncio.run(woken()) < 30


def test_an_engine_that_cannot_go_on_ends_the_others() -> None:
    async def broken() -> Wishes:
        there = await _asked("a")
        await there.broken(OrchestratorError("full"))
        return await there.wishes(1, 2, 1, ())

    error = asyncio.run(broken()).error
    assert isinstance(error, OrchestratorError) and str(error) == "full"
