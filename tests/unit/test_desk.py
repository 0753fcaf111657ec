"""Where trials and the engine meet; the actor's class without its actor."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orchestrator.sweep.desk import Answer, Desk
from orchestrator.training.membership import Member

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
