"""Many adapters over one base, coming and going while it trains.

Who trains is asked of a `Membership` in every round: as requests do in an inference server, an
adapter joins, is trained to its next evaluation, waits for the word to go on, and leaves.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from orchestrator.config import JobConfig
from orchestrator.errors import (
    InterruptedRunError,
    OrchestratorError,
    TrainingError,
    WorkerLostError,
)
from orchestrator.training import course, evaluation, proof
from orchestrator.training.course import Course, Ground
from orchestrator.training.engine import Engine, StepResult
from orchestrator.training.events import Observer
from orchestrator.training.lanes import Lanes
from orchestrator.training.membership import Member, Membership, Wishes
from orchestrator.training.patience import patiently
from orchestrator.training.rows import Segment
from orchestrator.training.run import emit_start

# How a round's adapters are passed: together in one row, one after the other, or each in a thread.
Layout = Literal["fused", "in turn", "side by side"]
# Rounds of each layout that are timed before one is chosen; after so many one is tried again; so
# many of each count.
_TRIED_ROUNDS = 3
_AGAIN_ROUNDS = 16
_LATEST_ROUNDS = 32
# What takes so many times as long as the best is not tried again.
_HOPELESS = 1.5


class Host:
    """Trains whoever is a member, on every worker of its world alike."""

    def __init__(
        self,
        ground: Ground,
        membership: Membership,
        observer: Observer,
        places: int | None = None,
    ) -> None:
        """Over a base that was planned for `places` adapters at once, None for any number."""
        self._ground, self._membership, self._observer = ground, membership, observer
        self._places = places
        self._world = ground.world
        self._courses: dict[str, Course] = {}
        self._members: dict[str, Member] = {}
        # The base's own eval loss is every fresh adapter's: B is zero.
        self._base_loss: float | None = None
        self._pace = Pace(("fused", "in turn"), _TRIED_ROUNDS)
        # They are rare and long: one of each says enough.
        self._evaluations_pace = Pace(("in turn",), 1)
        self._lanes = Lanes(ground.engine)

    def run(self) -> Path | None:
        """Until the membership is closed; returns the folder of the best member, if one is named.

        Raises:
            InterruptedRunError: the observer asked to stop; every member has its checkpoint.
        """
        try:
            return self._run()
        finally:
            self._lanes.close()

    def emit(self, event: str, **fields: Any) -> None:
        """Tell all members."""
        for state in self._courses.values():
            state.observer.emit(event, **fields)

    def _run(self) -> Path | None:
        while True:
            wishes: Wishes = self._world.from_leader(
                self._membership.wishes(list(self._courses)) if self._world.leads else None
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
            elif not wanted.goes_on(self._members[name]):
                self._drop(name, None)
            else:
                self._members[name] = wanted

    def _let_in(self, wishes: Wishes) -> None:
        for name, member in wishes.members.items():
            if name not in self._courses:
                if self._places is None or len(self._courses) < self._places:
                    enter = partial(self._enter, name, member)
                    self._alone(name, enter, partial(self._begin, name))
                    self._tell(name)
            elif name in wishes.unheard:
                self._tell(name)

    def _enter(self, name: str, member: Member) -> None:
        observer = self._observer_of(member.folder)
        try:
            state = course.enter(self._ground, _unpaged(member.job), member.folder, observer)
        except BaseException as error:
            observer.emit("finish", status="failed", error=str(error))
            _close_observer(observer)
            raise
        self._courses[name], self._members[name] = state, member

    def _begin(self, name: str) -> None:
        """From the base itself, from a checkpoint, or from another trial's."""
        state, member = self._courses[name], self._members[name]
        course.resume(state, member.origin)
        if member.fork is not None and state.forked_from != member.origin:
            course.fork(state, member.fork, member.origin)
        course.check_length(state)
        emit_start(state)
        if state.progress.step == 0:
            course.evaluate(state, self._base_loss)
            self._base_loss = state.progress.eval_loss
        adapter = course.adapter_path(state)
        if state.done and self._world.leads and not proof.has_claim(adapter):
            # Killed between its last checkpoint and its adapter.
            self._save_adapter(state)

    def _round(self, names: list[str]) -> None:
        """One optimizer step of each, and the evaluations that are due then."""
        batches = {name: course.next_batch(self._courses[name], 0) for name in names}
        longest = max(len(part.example.ids) for batch in batches.values() for part in batch)
        layout: Layout = self._pace.choose(len(names), self._lanes.hold(len(names), longest))
        # Each worker measures other times, and all must sum alike.
        layout = self._world.from_leader(layout)
        began = time.perf_counter()
        if layout == "side by side":
            passed = self._side_by_side(names, batches, began)
        else:
            groups = [names] if layout == "fused" else [[name] for name in names]
            passed = list(self._in_turn(groups, batches))
        seconds, tokens = time.perf_counter() - began, sum(part.tokens for part in passed)
        self._pace.measured(len(names), layout, tokens, seconds)
        for part in passed:
            self._take(part)
        self._report([name for name in names if name in self._courses])

    def _side_by_side(
        self, names: list[str], batches: dict[str, list[Segment]], began: float
    ) -> list["_Passed"]:
        works = [partial(self._pass, [name], batches) for name in names]
        parts: list[_Passed] = []
        for name, found in zip(names, self._lanes.run(works), strict=True):
            if isinstance(found.exception(), TrainingError):
                # The neighbours took the memory that it lacked; nothing was changed by it.
                self._lanes.forbid()
                parts.extend(self._in_turn([[name]], batches))
            else:
                parts.append(found.result())
        # They share the seconds, as those of a fused pass do.
        trained = [name for part in parts for name in part.names]
        results = [result for part in parts for result in part.results]
        return [_Passed(trained, results, time.perf_counter() - began, 0.0)]

    def _in_turn(
        self, groups: Sequence[list[str]], batches: dict[str, list[Segment]]
    ) -> Iterator["_Passed"]:
        """A step of each group; who lacks the memory for it alone has failed, without the rest."""
        engine = self._ground.engine
        for group in groups:
            tokens = engine.tokens_per_pass
            try:
                yield self._pass(group, batches, engine)
            except TrainingError as error:
                # All workers know of it, and nothing was changed by it. The rows that it was cut
                # down to in vain are not what the others need.
                engine.shortened(engine.tokens_per_pass, tokens)
                engine.tokens_per_pass = tokens
                if len(group) > 1:
                    yield from self._in_turn([[name] for name in group], batches)
                else:
                    self._fail(group[0], str(error))

    def _pass(
        self, names: list[str], batches: dict[str, list[Segment]], engine: Engine
    ) -> "_Passed":
        """A step of adapters that share their passes."""
        began, waited = time.perf_counter(), self._world.waited
        states = [self._courses[name] for name in names]
        results = engine.step(
            [state.tenant for state in states],
            [[replace(part, tenant=n) for part in batches[name]] for n, name in enumerate(names)],
            [state.progress.step + 1 for state in states],
        )
        return _Passed(names, results, time.perf_counter() - began, self._world.waited - waited)

    def _take(self, passed: "_Passed") -> None:
        for name, result in zip(passed.names, passed.results, strict=True):
            # What a member took of a shared step, by its tokens.
            share = result.tokens / passed.tokens if passed.tokens else 1 / len(passed.names)
            seconds, waited = max(passed.seconds * share, 1e-9), passed.waited * share
            try:
                course.take_step(self._courses[name], result, seconds, waited)
            except TrainingError as error:
                # The loss is summed over the workers: all of them see the same.
                self._fail(name, str(error))

    def _report(self, names: list[str]) -> None:
        due = [name for name in names if course.evaluation_due(self._courses[name])]
        layout = self._evaluations_pace.choose(len(due), self._can_evaluate_beside(due))
        began = time.perf_counter()
        losses = self._eval_losses(due) if layout == "side by side" else {}
        for name in names:
            if name in due:
                self._alone(name, partial(self._evaluate, name, losses.get(name)))
                self._tell(name)
            else:
                course.save_if_due(self._courses[name])
        self._evaluations_pace.measured(len(due), layout, len(due), time.perf_counter() - began)

    def _can_evaluate_beside(self, names: list[str]) -> bool:
        held_out = self._ground.data.validation
        if held_out is None or len(names) < 2:
            return False
        return self._lanes.hold(len(names), int(held_out.lengths.max()))

    def _eval_losses(self, names: list[str]) -> dict[str, Future[float]]:
        """The eval losses of several at once."""
        held_out = self._ground.data.validation
        assert held_out is not None
        works = [
            partial(
                evaluation.eval_loss, adapter=self._courses[name].tenant.adapter, dataset=held_out
            )
            for name in names
        ]
        return dict(zip(names, self._lanes.run(works), strict=True))

    def _evaluate(self, name: str, loss: Future[float] | None) -> None:
        """Evaluate and save; a trial that is at its end has its adapter by then."""
        state = self._courses[name]
        if loss is None or isinstance(loss.exception(), TrainingError):
            # Alone, or again alone, for the neighbours took the memory that it lacked.
            course.evaluate(state)
        else:
            course.evaluate(state, loss.result())
        state.progress = state.progress.reported(state.done)
        if state.done:
            course.save_at_last(state)
            if self._world.leads:
                self._save_adapter(state)
        else:
            course.save_if_due(state, asked=True)

    def _save_adapter(self, state: Course) -> None:
        patiently(lambda: proof.drop_claim(course.adapter_path(state)), state.say)
        path, claim = course.save_adapter(state), course.claim(state)
        patiently(lambda: claim.save(path), state.say)
        step, loss = state.progress.step, state.progress.eval_loss
        state.observer.emit("adapter", step=step, path=str(path), eval_loss=loss)

    def _tell(self, name: str) -> None:
        """What its evaluations said; a desk that does not hear it is no fault of the member."""
        if self._world.leads and name in self._courses:
            reports = self._courses[name].progress.reports
            self._membership.report(name, [dict(report) for report in reports])

    def _alone(self, name: str, *parts: Callable[[], None]) -> None:
        """Do parts of one member's work; an error in any ends that member on every worker.

        All workers have done a part before the next begins: one that failed meets the others
        there, who would else wait for it in a collective of theirs.
        """
        try:
            for part in parts:
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


def _unpaged(job: JobConfig) -> JobConfig:
    """Adapters come and go, and paged memory would come and go with them, slowly."""
    if job.training.optimizer != "auto":
        return job
    training = job.training.model_copy(update={"optimizer": "adamw"})
    return job.model_copy(update={"training": training})


@dataclass(frozen=True)
class _Passed:
    """Steps of adapters that shared their passes; waited: seconds of it in the collective."""

    names: list[str]
    results: list[StepResult]
    seconds: float
    waited: float

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return sum(result.tokens for result in self.results)


class Pace:
    """Which layout is the fastest here; the results are the same in any.

    The first rounds of each number of adapters try them all. Other processes disturb some layouts
    more than others, now and then: so the mean of the latest rounds counts, and the others are
    tried again from time to time.
    """

    def __init__(self, layouts: Sequence[Layout], tries: int) -> None:
        """Of these layouts, and of side by side where that can be; each is tried so often."""
        self._layouts, self._tries = list(layouts), tries
        self._tried: Counter[tuple[int, Layout]] = Counter()
        self._seconds_per_token: dict[tuple[int, Layout], deque[float]] = {}

    def choose(self, adapters: int, beside: bool) -> Layout:
        """How the next round of so many adapters is passed.

        Args:
            adapters: how many there are.
            beside: whether they can be passed side by side.
        """
        if adapters < 2:
            return self._layouts[0]
        possible: list[Layout] = [*self._layouts, "side by side"] if beside else self._layouts
        tried = {layout: self._tried[adapters, layout] for layout in possible}
        least = min(possible, key=lambda layout: tried[layout])
        if tried[least] < self._tries:
            return least
        means = {layout: fmean(self._seconds_per_token[adapters, layout]) for layout in possible}
        best = min(possible, key=lambda layout: means[layout])
        if sum(tried.values()) % _AGAIN_ROUNDS == 0:
            hopeful = [layout for layout in possible if means[layout] < _HOPELESS * means[best]]
            return min(hopeful, key=lambda layout: tried[layout])
        return best

    def measured(self, adapters: int, layout: Layout, tokens: int, seconds: float) -> None:
        """What a round took."""
        if tokens:
            key = (adapters, layout)
            latest = self._seconds_per_token.setdefault(key, deque(maxlen=_LATEST_ROUNDS))
            if self._tried[key] == 1:
                # The first one loads kernels and takes memory from the system.
                latest.clear()
            latest.append(seconds / tokens)
            self._tried[key] += 1


class _Silent:
    """For the workers that do not lead."""

    def emit(self, event: str, **fields: Any) -> None:
        """Nothing: the leading worker tells."""

    def sync(self) -> None:
        """Nothing."""

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
