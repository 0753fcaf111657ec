"""Adapters that come and go over one base: each one's curve is its own, whoever is beside it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import JobConfig
from orchestrator.jobfile import load_job
from orchestrator.sweep.space import trial_job
from orchestrator.training.collective import World
from orchestrator.training.host import Host, Layout
from orchestrator.training.membership import Member, Wishes
from orchestrator.training.run import open_ground, run

CPU = torch.device("cpu")


class Recorder:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

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

    def wishes(self) -> Wishes:
        for name, reports in self.reports.items():
            if reports and name in self.members:
                self.members[name] = replace(self.members[name], after=reports[-1]["step"])
                if reports[-1]["done"]:
                    self.end(name, "stopped")
        closed = self.rule(self)
        return Wishes(dict(self.members), dict(self.ended), closed=closed)

    def report(self, name: str, results: list[dict[str, Any]]) -> None:
        self.reports[name] = results

    def left(self, name: str) -> None:
        self.ended.pop(name, None)

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


def _host(job: JobConfig, club: Club, cache: Path) -> Host:
    ground = open_ground(job, cache, CPU, World(), Recorder())
    return Host(ground, club, Recorder())


def _solo(member: Member, folder: Path, cache: Path) -> list[float]:
    alone = Recorder()
    run(member.job, folder, cache, CPU, World(), alone)
    return alone.losses()


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


def test_one_that_fails_ends_alone(job: JobConfig, club: Club, tmp_path: Path) -> None:
    club.join("good", job)
    club.join("lost", job, **{"training.learning_rate": 1e38})
    club.join("bad", job, **{"lora.target_modules": ["no_such_layer"]})
    _host(job, club, tmp_path / "cache").run()
    assert len(club.observers["good"].losses()) == 8
    assert "loss of step" in club.failures["lost"]
    assert "no_such_layer" in club.failures["bad"]
    assert [e["status"] for e in club.observers["lost"].of("finish")] == ["failed"]


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
    assert [e["step"] for e in forked.of("step")] == [5, 6, 7, 8]
    assert {e["learning_rate"] for e in forked.of("step")} == {1e-4}
    # The first step after the fork has the donor's weights still.
    assert forked.losses()[0] == pytest.approx(donor.losses()[4], rel=1e-6)
    assert forked.losses()[-1] != pytest.approx(donor.losses()[-1], rel=1e-6)


def test_the_faster_layout_is_chosen_after_trying_both() -> None:
    layout = Layout()
    tried = []
    for _ in range(10):
        fused = layout.fuse(3)
        tried.append(fused)
        layout.measured(3, fused, 100, 1.0 if fused else 2.0)
    assert set(tried[:6]) == {True, False} and all(tried[6:])
    assert layout.fuse(1)
