"""Adapters that come and go over one base: each one's curve is its own, whoever is beside it."""

import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError, TrainingError
from orchestrator.jobfile import load_job
from orchestrator.sweep.space import trial_job
from orchestrator.training import proof
from orchestrator.training.collective import World
from orchestrator.training.engine import Engine
from orchestrator.training.host import Host, Pace
from orchestrator.training.lanes import Lanes
from orchestrator.training.membership import Member, Wishes
from orchestrator.training.run import open_ground, run, tell_shortened

CPU = torch.device("cpu")


class Recorder:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def sync(self) -> None:
        return

    def stop_requested(self) -> bool:
        return False

    def save_requested(self) -> bool:
        return False

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def losses(self) -> list[float]:
        return [event["loss"] for event in self.of("step")]


class Club:
    """Members that join and leave by rules of a test, asked in every round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.members: dict[str, Member] = {}
        self.ended: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.reports: dict[str, list[dict[str, Any]]] = {}
        self.observers: dict[str, Recorder] = {}
        self.rule: Callable[[Club], bool] = lambda club: not club.members

    def join(self, name: str, job: JobConfig, **settings: Any) -> None:
        made = trial_job(job, name, self.folder, settings, "sqlite:///unused.db")
        self.members[name] = Member(made, self.folder / name)

    def end(self, name: str, status: str) -> None:
        del self.members[name]
        self.ended[name] = status

    def wishes(self, holds: Collection[str]) -> Wishes:
        for name, reports in self.reports.items():
            if reports and name in self.members:
                self.members[name] = replace(self.members[name], after=reports[-1]["step"])
                if reports[-1]["done"]:
                    self.end(name, "stopped")
        closed = self.rule(self)
        return Wishes(dict(self.members), dict(self.ended), closed=closed)

    def report(self, name: str, results: list[dict[str, Any]]) -> None:
        self.reports[name] = results

    def failed(self, name: str, error: str) -> None:
        self.failures[name] = error
        self.members.pop(name, None)

    def observe(self, folder: Path) -> Recorder:
        return self.observers.setdefault(folder.name, Recorder())

    def pause(self) -> None:
        return


@pytest.fixture
def job(job_file: Callable[..., Path]) -> JobConfig:
    return load_job(
        job_file(
            "host",
            training={"max_steps": 8},
            evaluation={"every": 4, "samples": 0},
            checkpoint={"every": 4},
            sweep={"search_space": {"lora.rank": {"choice": [4]}}},
        )
    )


@pytest.fixture
def club(tmp_path: Path) -> Club:
    return Club(tmp_path / "trials")


def _host(job: JobConfig, club: Club, cache: Path, places: int | None = None) -> Host:
    ground = open_ground(job, cache, CPU, World(), Recorder())
    return Host(ground, club, Recorder(), places)


def _solo(member: Member, folder: Path, cache: Path) -> list[float]:
    alone = Recorder()
    run(member.job, folder, cache, CPU, World(), alone)
    return alone.losses()


def test_what_befalls_an_engine_is_told_to_each_of_its_trials(
    job: JobConfig, club: Club, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        club.join(name, job)
    host = _host(job, club, tmp_path / "cache")

    def tell(club: Club) -> bool:
        tell_shortened(host.emit, 512, 256)
        return not club.members

    club.rule = tell
    host.run()
    for observer in club.observers.values():
        assert observer.of("budget")[0]["tokens_per_pass"] == 256
        assert "256 tokens, not 512" in observer.of("warning")[0]["message"]
    assert set(club.observers) == {"a", "b"}


def test_curves_are_those_of_solo_runs_whoever_joins_and_leaves(
    job: JobConfig, club: Club, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    club.join("a", job, **{"lora.rank": 4, "training.seed": 1})
    club.join("b", job, **{"lora.rank": 8, "training.learning_rate": 1e-2})
    jobs = dict(club.members)

    def rule(club: Club) -> bool:
        """`b` is stopped after its first evaluation; `c` and `d` take its place."""
        if "b" in club.members and any(r["step"] == 4 for r in club.reports.get("b", [])):
            club.end("b", "stopped")
            club.join("c", job, **{"lora.dropout": 0.2, "training.batch_size": 3})
            club.join("d", job, **{"lora.target_modules": ["q_proj"], "lora.rslora": True})
            jobs.update(club.members)
        return not club.members

    club.rule = rule
    _host(job, club, cache).run()
    assert set(jobs) == set(club.observers) == {"a", "b", "c", "d"}
    for name, member in jobs.items():
        found = club.observers[name].losses()
        assert len(found) == (4 if name == "b" else 8)
        alone = _solo(member, tmp_path / f"solo-{name}", cache)
        assert found == pytest.approx(alone[: len(found)], rel=1e-4)
        (end,) = club.observers[name].of("finish")
        assert end["status"] == ("stopped" if name == "b" else "finished")
        assert (member.folder / "adapter").is_dir() == (name != "b")


def test_more_than_there_are_places_for_wait(job: JobConfig, club: Club, tmp_path: Path) -> None:
    """A sweep that goes on where there is less memory has more trials at a time than places."""
    for name in ("a", "b", "c"):
        club.join(name, job, **{"lora.rank": 4})
    host, at_once = _host(job, club, tmp_path / "cache", places=2), []

    def closed(club: Club) -> bool:
        at_once.append(len(host._courses))
        return not club.members

    club.rule = closed
    host.run()
    assert max(at_once) == 2
    assert {name: len(club.observers[name].losses()) for name in ("a", "b", "c")} == {
        name: 8 for name in ("a", "b", "c")
    }


def test_one_that_fails_ends_alone(job: JobConfig, club: Club, tmp_path: Path) -> None:
    club.join("good", job)
    club.join("lost", job, **{"training.learning_rate": 1e38})
    club.join("bad", job, **{"lora.target_modules": ["no_such_layer"]})
    _host(job, club, tmp_path / "cache").run()
    assert len(club.observers["good"].losses()) == 8
    assert "loss of step" in club.failures["lost"]
    assert "no_such_layer" in club.failures["bad"]
    assert [e["status"] for e in club.observers["lost"].of("finish")] == ["failed"]


def test_an_adapter_that_a_kill_prevented_is_made_by_the_next_engine(
    job: JobConfig, club: Club, tmp_path: Path
) -> None:
    club.join("a", job)
    member, folder = club.members["a"], club.folder / "a"
    _host(job, club, tmp_path / "cache").run()
    claimed = proof.Claim.load(folder / "adapter")
    # Killed after its last checkpoint.
    shutil.rmtree(folder / "adapter")
    proof._path(folder / "adapter").unlink()

    again = Club(club.folder)
    again.members["a"] = member
    _host(job, again, tmp_path / "cache").run()
    assert again.observers["a"].losses() == [] and (folder / "adapter").is_dir()
    assert [e["status"] for e in again.observers["a"].of("finish")] == ["finished"]
    made = proof.Claim.load(folder / "adapter")
    assert torch.equal(made.ids, claimed.ids) and torch.allclose(made.logits, claimed.logits)


def test_who_cannot_be_let_in_on_one_worker_begins_on_none(
    job: JobConfig, club: Club, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beginning is a collective, in which the others would wait for the one that failed."""
    host = _host(job, club, tmp_path / "cache")

    @contextmanager
    def together(world: World) -> Iterator[None]:
        yield
        raise OrchestratorError("Another worker has no memory for it")

    monkeypatch.setattr(World, "together", together)
    club.join("a", job)
    host.run()
    assert club.failures == {"a": "Another worker has no memory for it"}
    assert [e["event"] for e in club.observers["a"].events] == ["finish"]


def test_whoever_comes_back_goes_on_and_a_forgetful_membership_is_told_again(
    job: JobConfig, club: Club, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    club.join("a", job)
    member = club.members["a"]
    club.rule = lambda club: any(r["step"] == 4 for r in club.reports.get("a", []))
    _host(job, club, cache).run()
    assert len(club.observers["a"].losses()) == 4

    # Another engine; who asks has forgotten all, and says what it last heard.
    again = Club(club.folder)
    again.observers = club.observers
    again.members["a"] = member
    _host(job, again, cache).run()
    assert [e["resumed_from"] for e in club.observers["a"].of("start")] == [0, 4]
    assert [r["step"] for r in again.reports["a"]] == [4, 8]
    assert club.observers["a"].losses() == pytest.approx(
        _solo(member, tmp_path / "solo", cache), rel=1e-6
    )


def test_a_fork_goes_on_from_another_ones_checkpoint(
    job: JobConfig, club: Club, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    club.join("donor", job)
    _host(job, club, cache).run()
    fork = club.folder / "donor" / "checkpoints" / "step-00000004"
    club.join("forked", job, **{"training.learning_rate": 1e-4})
    club.members["forked"] = replace(club.members["forked"], fork=fork, after=4)
    _host(job, club, cache).run()
    forked, donor = club.observers["forked"], club.observers["donor"]
    assert not club.failures
    assert [e["step"] for e in forked.of("step")] == [5, 6, 7, 8]
    assert {e["learning_rate"] for e in forked.of("step")} == {1e-4}
    # The first step after the fork has the donor's weights still.
    assert forked.losses()[0] == pytest.approx(donor.losses()[4], rel=1e-6)
    assert forked.losses()[-1] != pytest.approx(donor.losses()[-1], rel=1e-6)


def test_a_fork_whose_checkpoint_is_gone_goes_on_from_the_newest(
    job: JobConfig, club: Club, tmp_path: Path
) -> None:
    cache, checkpoints = tmp_path / "cache", club.folder / "donor" / "checkpoints"
    club.join("donor", job, **{"training.learning_rate": 1e-3})
    _host(job, club, cache).run()
    club.join("forked", job, **{"training.learning_rate": 1e-4})
    gone = checkpoints / "step-00000006"
    shutil.rmtree(checkpoints / "step-00000008")
    club.members["forked"] = replace(club.members["forked"], fork=gone, after=4)
    _host(job, club, cache).run()
    assert [e["step"] for e in club.observers["forked"].of("step")] == [5, 6, 7, 8]
    # Of another adapter the newest is no substitute; nor is there one where all are gone.
    for name, alpha in (("other", 1.0), ("lost", job.lora.alpha)):
        club.join(name, job, **{"lora.alpha": alpha})
        club.members[name] = replace(club.members[name], fork=gone, after=4)
        _host(job, club, cache).run()
        assert "cannot be read" in club.failures[name]
        shutil.rmtree(checkpoints, ignore_errors=True)


def test_a_fork_of_another_rank_takes_the_place_of_what_was_trained(
    job: JobConfig, club: Club, tmp_path: Path
) -> None:
    """A population's trial becomes a better one, and goes on from there after a kill too."""
    cache = tmp_path / "cache"
    club.join("donor", job, **{"lora.rank": 8})
    club.join("worse", job, **{"lora.rank": 2})
    _host(job, club, cache).run()
    again = Club(club.folder)
    longer = {"training.learning_rate": 1e-4, "training.max_steps": 12}
    again.join("worse", job, **{"lora.rank": 8, **longer})
    fork = club.folder / "donor" / "checkpoints" / "step-00000004"
    moved = replace(again.members["worse"], fork=fork, after=4, generation=17)
    again.members["worse"] = moved
    again.rule = lambda club: any(r["step"] == 8 for r in club.reports.get("worse", []))
    _host(job, again, cache).run()
    assert not again.failures
    assert [e["step"] for e in again.observers["worse"].of("step")] == [5, 6, 7, 8]

    # An engine that comes after a kill is told of the same fork, and does not begin it anew.
    later = Club(club.folder)
    later.observers, later.members["worse"] = again.observers, replace(moved, after=8)
    _host(job, later, cache).run()
    assert not later.failures
    assert [e["step"] for e in later.observers["worse"].of("step")] == list(range(5, 13))


def test_who_lacks_the_memory_for_a_step_ends_alone(
    job: JobConfig, club: Club, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    club.join("small", job)
    club.join("large", job, **{"lora.rank": 16})
    step = Engine.step

    def scarce(engine: Engine, tenants: Any, batches: Any, steps: Any) -> Any:
        if any(tenant.adapter.config.rank == 16 for tenant in tenants):
            engine.tokens_per_pass = 16
            raise TrainingError("Out of memory")
        return step(engine, tenants, batches, steps)

    monkeypatch.setattr(Engine, "step", scarce)
    host = _host(job, club, tmp_path / "cache")
    tokens = host._ground.engine.tokens_per_pass
    host.run()
    assert club.failures == {"large": "Out of memory"}
    # What it was cut down to in vain is not what the others need.
    assert host._ground.engine.tokens_per_pass == tokens > 16
    assert len(club.observers["small"].losses()) == 8


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As on two cores; other tests of this process have what they had."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_side_by_side_train_as_alone(
    job: JobConfig,
    club: Club,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    two_threads: None,
    checkpointing: bool,
) -> None:
    recomputed = job.training.model_copy(update={"gradient_checkpointing": checkpointing})
    job = job.model_copy(update={"training": recomputed})
    monkeypatch.setattr(Pace, "choose", _beside)
    threads: set[int] = set()
    for name in ("step", "evaluate"):
        _note_thread(monkeypatch, name, threads)
    cache = tmp_path / "cache"
    club.join("a", job)
    club.join("b", job, **{"lora.rank": 8, "lora.dropout": 0.5, "training.seed": 3})
    club.join("lost", job, **{"training.learning_rate": 1e38})
    jobs = dict(club.members)
    _host(job, club, cache).run()
    # The base's own eval loss is computed before there is anyone to be beside.
    assert len(threads - {threading.get_ident()}) == 2
    assert "loss of step" in club.failures["lost"]
    for name in ("a", "b"):
        alone = Recorder()
        run(jobs[name].job, tmp_path / f"solo-{name}", cache, CPU, World(), alone)
        for kind, value in (("step", "loss"), ("evaluation", "eval_loss")):
            found = [event[value] for event in club.observers[name].of(kind)]
            assert found == pytest.approx([e[value] for e in alone.of(kind)], rel=1e-5)


def test_who_lacks_memory_beside_others_is_trained_alone(
    job: JobConfig,
    club: Club,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    two_threads: None,
) -> None:
    asked: list[bool] = []

    def choose(pace: Pace, adapters: int, beside: bool) -> str:
        asked.append(beside)
        return "side by side" if beside else "fused"

    monkeypatch.setattr(Pace, "choose", choose)
    step, here = Engine.step, threading.get_ident()

    def short(engine: Engine, tenants: Any, *arguments: Any) -> Any:
        if threading.get_ident() != here and tenants[0].adapter.config.rank == 8:
            raise TrainingError("Out of memory")
        return step(engine, tenants, *arguments)

    monkeypatch.setattr(Engine, "step", short)
    club.join("a", job)
    club.join("b", job, **{"lora.rank": 8})
    _host(job, club, tmp_path / "cache").run()
    assert asked[0] and not any(asked[1:])
    for observer in club.observers.values():
        assert len(observer.losses()) == 8 and not club.failures


def test_workers_pass_as_the_leader_says_for_each_measures_other_times(
    job: JobConfig, club: Club, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def from_leader(world: World, value: Any) -> Any:
        told.append(value)
        return "in turn" if isinstance(value, str) else value

    monkeypatch.setattr(World, "from_leader", from_leader)
    together: set[int] = set()
    step = Engine.step

    def noted(engine: Engine, tenants: Any, *arguments: Any) -> Any:
        together.add(len(tenants))
        return step(engine, tenants, *arguments)

    monkeypatch.setattr(Engine, "step", noted)
    club.join("a", job)
    club.join("b", job)
    _host(job, club, tmp_path / "cache").run()
    assert "fused" in told and together == {1}


def test_memory_that_runs_out_in_a_lane_shortens_the_passes_of_all(
    job: JobConfig, tmp_path: Path, two_threads: None
) -> None:
    engine = open_ground(job, tmp_path / "cache", CPU, World(), Recorder()).engine
    engine.tokens_per_pass = 400
    lanes = Lanes(engine)
    assert lanes.hold(2, 200) and not lanes.hold(2, 201) and not lanes.hold(1, 10)

    def shorten(part: Engine) -> int:
        before, part.tokens_per_pass = part.tokens_per_pass, 150
        return before

    assert [found.result() for found in lanes.run([shorten, shorten])] == [200, 200]
    assert engine.tokens_per_pass == 300

    def fail(part: Engine) -> int:
        raise ValueError("alone")

    failed, done = lanes.run([fail, lambda part: torch.get_num_threads()])
    assert str(failed.exception()) == "alone" and done.result() == 1
    assert engine.tokens_per_pass == 300
    lanes.close()


def _note_thread(monkeypatch: pytest.MonkeyPatch, name: str, threads: set[int]) -> None:
    work = getattr(Engine, name)

    def noted(engine: Engine, *arguments: Any) -> Any:
        threads.add(threading.get_ident())
        return work(engine, *arguments)

    monkeypatch.setattr(Engine, name, noted)


def _beside(pace: Pace, adapters: int, beside: bool) -> str:
    assert beside or adapters < 2
    return "side by side" if beside else "fused"


def test_the_fastest_layout_is_chosen_after_trying_all() -> None:
    seconds = {"fused": 2.0, "in turn": 3.0, "side by side": 1.0}
    for beside, best in ((True, "side by side"), (False, "fused")):
        pace, tried = Pace(("fused", "in turn"), 3), []
        for _ in range(12):
            layout = pace.choose(3, beside)
            tried.append(layout)
            pace.measured(3, layout, 100, seconds[layout])
        assert set(tried) == {layout for layout in seconds if beside or layout != "side by side"}
        assert set(tried[9:]) == {best}
    assert Pace(("fused", "in turn"), 3).choose(1, False) == "fused"


def test_a_layout_that_becomes_slow_is_left_for_another() -> None:
    pace, chosen = Pace(("fused", "in turn"), 3), []
    for number in range(200):
        layout = pace.choose(2, False)
        chosen.append(layout)
        # Other processes disturb it later on.
        slow = layout == "fused" and number >= 50
        pace.measured(2, layout, 100, 9.0 if slow else 1.0 if layout == "fused" else 2.0)
    assert chosen[10:50].count("fused") > 35
    assert chosen[100:].count("in turn") > 80


def test_the_first_round_of_a_layout_loads_kernels_and_does_not_count() -> None:
    pace, chosen = Pace(("fused", "in turn"), 3), []
    for number in range(40):
        layout = pace.choose(2, False)
        chosen.append(layout)
        pace.measured(2, layout, 100, 99.0 if number == 0 else 1.0 if layout == "fused" else 2.0)
    # In turn takes twice as long, which is not tried again.
    assert chosen.count("in turn") == 3


def test_of_evaluations_too_the_faster_way_is_chosen() -> None:
    pace, tried = Pace(("in turn",), 1), []
    for _ in range(4):
        layout = pace.choose(2, True)
        tried.append(layout)
        pace.measured(2, layout, 2, 5.0 if layout == "side by side" else 4.0)
    assert tried == ["in turn", "side by side", "in turn", "in turn"]
