"""Many adapters over one base, coming and going while it trains.

Who trains is asked of a `Membership` in every round: as requests do in an inference server, an
adapter joins, is trained to its next evaluation, waits for the word to go on, and leaves.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.errors import (
    InterruptedRunError,
    OrchestratorError,
    TrainingError,
    WorkerLostError,
)
from orchestrator.training import course, export
from orchestrator.training.course import Course, Ground
from orchestrator.training.events import Observer
from orchestrator.training.membership import Member, Membership, Wishes
from orchestrator.training.run import emit_start

# Rounds of each layout that are timed before one is chosen.
_TRIED_ROUNDS = 3


class Host:
    """Trains whoever is a member, on every worker alike."""

    def __init__(self, ground: Ground, membership: Membership, observer: Observer) -> None:
        self._ground, self._membership, self._observer = ground, membership, observer
        self._world = ground.world
        self._courses: dict[str, Course] = {}
        self._members: dict[str, Member] = {}
        # The base's own eval loss is every fresh adapter's: B is zero.
        self._base_loss: float | None = None
        self._layout = Layout()

    def run(self) -> Path | None:
        """Until the membership is closed; returns the folder of the best member, if one is named.

        Raises:
            InterruptedRunError: the observer asked to stop; every member has its checkpoint.
        """
        while True:
            wishes: Wishes = self._world.from_leader(
                self._membership.wishes() if self._world.leads else None
            )
            self._let_go(wishes)
            self._let_in(wishes)
            stop, gone = self._world.any(
                self._observer.stop_requested(), self._observer.save_requested()
            )
            if stop or gone:
                for state in self._courses.values():
                    course.save_if_due(state, asked=True)
            if stop:
                self._close()
                raise InterruptedRunError("The sweep was stopped; every trial has its checkpoint")
            if wishes.closed:
                self._close()
                return wishes.best
            going = [name for name in self._courses if self._goes_on(name)]
            if going:
                self._round(going)
            elif self._world.leads:
                self._membership.pause()

    def _goes_on(self, name: str) -> bool:
        state, reports = self._courses[name], self._courses[name].progress.reports
        return not state.done and (not reports or reports[-1]["step"] <= self._members[name].after)

    def _let_go(self, wishes: Wishes) -> None:
        for name in list(self._courses):
            wanted = wishes.members.get(name)
            if wanted is None:
                self._drop(name, wishes.ended.get(name, "stopped"))
            elif wanted.generation != self._members[name].generation:
                self._drop(name, None)
            else:
                self._members[name] = wanted
        if self._world.leads:
            for name in wishes.ended:
                self._membership.left(name)

    def _let_in(self, wishes: Wishes) -> None:
        for name, member in wishes.members.items():
            if name not in self._courses:
                self._alone(name, partial(self._join, name, member))
            elif name in wishes.unheard:
                self._tell(name)

    def _join(self, name: str, member: Member) -> None:
        observer = self._observer_of(member.folder)
        try:
            state = course.enter(self._ground, member.job, member.folder, observer)
        except BaseException as error:
            observer.emit("finish", status="failed", error=str(error))
            _close_observer(observer)
            raise
        self._courses[name], self._members[name] = state, member
        course.resume(state)
        if member.fork is not None and state.forked_from != str(member.fork):
            course.fork(state, member.fork)
        emit_start(state)
        if state.progress.step == 0:
            course.evaluate(state, self._base_loss)
            self._base_loss = state.progress.eval_loss
        self._tell(name)

    def _round(self, names: list[str]) -> None:
        """One optimizer step of each."""
        fused = self._layout.fuse(len(names))
        began, tokens = time.perf_counter(), 0
        for group in [names] if fused else [[name] for name in names]:
            tokens += self._step(group)
        self._layout.measured(len(names), fused, tokens, time.perf_counter() - began)
        for name in names:
            if name in self._courses and course.evaluation_due(self._courses[name]):
                self._alone(name, partial(self._report, name))
            elif name in self._courses:
                course.save_if_due(self._courses[name])

    def _step(self, names: list[str]) -> int:
        began, waited = time.perf_counter(), self._world.waited
        states = [self._courses[name] for name in names]
        batches = [course.next_batch(state, place) for place, state in enumerate(states)]
        results = self._ground.engine.step(
            [state.tenant for state in states],
            batches,
            [state.progress.step + 1 for state in states],
        )
        seconds, waited = time.perf_counter() - began, self._world.waited - waited
        total = sum(result.tokens for result in results)
        for name, state, result in zip(names, states, results, strict=True):
            share = result.tokens / total if total else 1 / len(names)
            try:
                # What a member took of a shared step, by its tokens.
                course.take_step(state, result, max(seconds * share, 1e-9), waited * share)
            except TrainingError as error:
                # The loss is summed over the workers: all of them see the same.
                self._fail(name, str(error))
        return total

    def _report(self, name: str) -> None:
        """Evaluate, save, and tell; a trial that is at its end has its adapter by then."""
        state = self._courses[name]
        course.evaluate(state)
        state.progress = state.progress.reported(state.done)
        if state.done:
            course.save_at_last(state)
            if self._world.leads:
                self._save_adapter(state)
        else:
            course.save_if_due(state, asked=True)
        self._tell(name)

    def _save_adapter(self, state: Course) -> None:
        path = course.save_adapter(state)
        ground = self._ground
        example = course.shortest_example(ground.data.validation or ground.data.train)
        ids, logits = export.proof_logits(
            ground.engine.base, ground.engine.adapters, state.tenant.adapter, example
        )
        export.keep_claim(path, ids, logits)
        step, loss = state.progress.step, state.progress.eval_loss
        state.observer.emit("adapter", step=step, path=str(path), eval_loss=loss)

    def _tell(self, name: str) -> None:
        if self._world.leads:
            reports = self._courses[name].progress.reports
            self._membership.report(name, [dict(report) for report in reports])

    def _alone(self, name: str, part: Callable[[], None]) -> None:
        """Do a part of one member's work; its error ends that member on every worker."""
        try:
            with self._world.together():
                try:
                    part()
                except (OrchestratorError, WorkerLostError):
                    raise
                except Exception as error:
                    raise OrchestratorError(f"{type(error).__name__}: {error}") from error
        except OrchestratorError as error:
            self._fail(name, str(error))

    def _fail(self, name: str, error: str) -> None:
        if name in self._courses:
            self._drop(name, "failed", error)
        if self._world.leads:
            self._membership.failed(name, error)

    def _drop(self, name: str, status: str | None, error: str | None = None) -> None:
        state = self._courses.pop(name)
        del self._members[name]
        course.leave(state)
        if status is not None:
            # "finished" is what was trained to its end, whoever asked it to leave.
            known = "finished" if state.done and status != "failed" else status
            summary = course.summary(state)
            state.observer.emit("finish", status=known, error=error, **summary)
        _close_observer(state.observer)

    def _close(self) -> None:
        for name in list(self._courses):
            self._drop(name, None)

    def _observer_of(self, folder: Path) -> Any:
        return self._membership.observe(folder) if self._world.leads else _Silent()


class Layout:
    """Whether a round's adapters share passes or are passed in turn, by what is faster here.

    The first rounds of each number of adapters try both; the results are the same either way.
    """

    def __init__(self) -> None:
        self._seconds_per_token: dict[tuple[int, bool], list[float]] = {}

    def fuse(self, adapters: int) -> bool:
        """Whether the next round of so many adapters shares its passes."""
        if adapters == 1:
            return True
        fused, turns = (self._seconds_per_token.get((adapters, f), []) for f in (True, False))
        if len(turns) < _TRIED_ROUNDS:
            return len(fused) <= len(turns)
        return min(fused) <= min(turns)

    def measured(self, adapters: int, fused: bool, tokens: int, seconds: float) -> None:
        """What a round took."""
        taken = self._seconds_per_token.setdefault((adapters, fused), [])
        if len(taken) <= _TRIED_ROUNDS and tokens:
            taken.append(seconds / tokens if math.isfinite(seconds) else math.inf)


class _Silent:
    """For the workers that do not lead."""

    def emit(self, event: str, **fields: Any) -> None:
        """Nothing: the leading worker tells."""

    def stop_requested(self) -> bool:
        """Never: the host asks its own observer."""
        return False

    def save_requested(self) -> bool:
        """Never."""
        return False


def _close_observer(observer: Any) -> None:
    if hasattr(observer, "close"):
        # The journal's last lines are kept until storage takes them; a sweep goes on without.
        with suppress(OSError):
            observer.close()
