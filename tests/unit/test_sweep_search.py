"""What Ray Tune is told of a job's sweep."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.pbt import _explore
from ray.tune.search import BasicVariantGenerator

from orchestrator.cluster.plan import Resources, WorkerPlan
from orchestrator.cluster.session import Session
from orchestrator.config import JobConfig
from orchestrator.plan.fit import cpu_workers
from orchestrator.sweep import places, search
from tests.unit.sweeps import sweep_job

RATE = "training.learning_rate"


def _job(search_space: dict[str, Any], **sweep: Any) -> JobConfig:
    return sweep_job(Path("there"), search_space, max_steps=50, **sweep)


@pytest.mark.parametrize(
    ("steps", "most"), [([20, 200, 100], 200), ([50, None], 10**6), (None, 50)]
)
def test_asha_lets_the_longest_trial_end(
    steps: list[int | None] | None, most: int, tmp_path: Path
) -> None:
    space = {"lora.rank": {"choice": [4]}}
    job = _job(space if steps is None else {"training.max_steps": {"choice": steps}})
    assert job.sweep is not None
    assert search.scheduler(job, job.sweep, tmp_path / "heard")._max_t == most


@pytest.mark.parametrize(
    ("domain", "allowed"),
    [
        ({"choice": [1e-4, 3e-4, 1e-3]}, lambda rate: rate in (1e-4, 3e-4, 1e-3)),
        ({"loguniform": [1e-4, 1e-3]}, lambda rate: 1e-4 <= rate <= 1e-3),
    ],
)
def test_a_population_stays_in_the_search_space(
    domain: dict[str, Any], allowed: Any, tmp_path: Path
) -> None:
    job = _job({RATE: domain}, scheduler="pbt")
    assert job.sweep is not None
    chosen, rates = search.scheduler(job, job.sweep, tmp_path / "heard"), [3e-4]
    for _ in range(200):
        config, _ = _explore(
            {RATE: rates[-1], "lora.rank": 4},
            chosen._hyperparam_mutations,
            chosen._resample_probability,
            chosen._perturbation_factors,
            chosen._custom_explore_fn,
        )
        assert config["lora.rank"] == 4
        rates.append(config[RATE])
    assert all(map(allowed, rates)) and len(set(rates)) > 2


def _trial(name: str, step: int = 0, loss: float = 0.0) -> Any:
    """A trial of which Tune knows this last result."""
    result = {"step": step, "eval_loss": loss} if step else {}
    return SimpleNamespace(trial_id=name, last_result=result)


def test_rungs_survive_a_kill(tmp_path: Path) -> None:
    job = _job({RATE: {"choice": [1e-3]}}, scheduler="asha")
    assert job.sweep is not None

    def asha() -> Any:
        assert job.sweep is not None
        return search.scheduler(job, job.sweep, tmp_path / "heard.jsonl")

    killed = asha()
    for name, loss in (("good", 1.0), ("fair", 1.1), ("late", 0.5)):
        killed.on_trial_add(None, _trial(name))
        killed.on_trial_result(None, _trial(name), {"step": 50, "eval_loss": loss})
    # Tune restores what it had noted: of the last trial it had not heard yet.
    restored = asha()
    for trial in (_trial("good", 50, 1.0), _trial("fair", 50, 1.1), _trial("late"), _trial("new")):
        restored.on_trial_add(None, trial)
    ((_, recorded),) = restored._brackets[0]._rungs
    assert recorded == {"good": -1.0, "fair": -1.1}
    bracket = restored._brackets[0]
    assert bracket.on_result(_trial("new"), 50, -2.0) == TrialScheduler.STOP
    assert bracket.on_result(_trial("late"), 50, -0.5) == TrialScheduler.CONTINUE


def test_a_search_goes_on_with_the_places_of_the_present_command() -> None:
    for kind in ("random", "optuna"):
        job = _job({RATE: {"loguniform": [1e-4, 1e-3]}}, searcher=kind, scheduler="none")
        assert job.sweep is not None
        before, now = (search.searcher(job.sweep, places, dict) for places in (8, 2))
        state = {**before.get_state(), "max_concurrent": 8} if kind == "optuna" else vars(before)
        now.set_state(state)
        assert now.max_concurrent == 2


def test_a_search_whose_states_are_of_two_moments_has_the_trials_that_tune_has() -> None:
    """Tune writes a searcher's state and its own one after the other."""
    known = {"running": False, "ended": True}
    for kind, live in (("random", "_live_trials"), ("optuna", "live_trials")):
        job = _job({RATE: {"loguniform": [1e-4, 1e-3]}}, searcher=kind, scheduler="none")
        assert job.sweep is not None
        found = search.searcher(job.sweep, 8, lambda: known)
        before = found.get_state()
        found.set_state({**before, live: {"running", "ended", "never noted"}})
        assert getattr(found, live) == {"running"}
        assert known not in before.values()
        if kind == "optuna":
            # Optuna knows none of them, and would fail.
            found.on_trial_result("ended", {"eval_loss": 1.0})


def test_a_trial_that_tune_has_is_not_proposed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job({RATE: {"loguniform": [1e-4, 1e-3]}}, searcher="random", scheduler="none")
    assert job.sweep is not None
    proposed = iter([SimpleNamespace(trial_id=name) for name in ("a", "b", "c")])
    monkeypatch.setattr(BasicVariantGenerator, "next_trial", lambda _: next(proposed))
    found = search.searcher(job.sweep, 8, lambda: {"a": False, "b": True})
    found.set_state(found.get_state())
    assert found.next_trial().trial_id == "c"


def test_our_own_cpus_have_a_worker_for_each_trial_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "workers_that_fit", cpu_workers)
    job = _job({RATE: {"loguniform": [1e-4, 1e-3]}}, trials=8)

    def workers(job: JobConfig, own: bool, cpus: float, gpus: float = 0) -> Any:
        here = Session(own, (Resources(cpus, gpus),), None)
        return places.cluster_of(job, here).workers

    assert [workers(job, True, cpus) for cpus in (1, 2, 8)] == [1, 2, 2]
    assert workers(_job({RATE: {"choice": [1e-3]}}, concurrent=5), True, 8) == 5
    # A cluster's CPUs are others' too, and GPUs are all used anyway.
    assert workers(job, False, 8) == workers(job, True, 8, 1) == "auto"
    on_cpus = job.cluster.model_copy(update={"gpus_per_worker": 0})
    assert workers(job.model_copy(update={"cluster": on_cpus}), True, 8, 1) == 2
    large = job.cluster.model_copy(update={"cpus_per_worker": 8})
    assert workers(job.model_copy(update={"cluster": large}), True, 2) == 1
    assert workers(job.model_copy(update={"cluster": large}), True, 16) == 2
    told = job.cluster.model_copy(update={"workers": 1})
    assert workers(job.model_copy(update={"cluster": told}), True, 8) == 1


def test_isolated_trials_of_our_own_cpus_are_as_many_as_the_memory_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "runs_that_fit", lambda job, most, workers: most // 2)
    space = {"data.max_length": {"choice": [256, 512]}}

    def runs(own: bool, **sweep: Any) -> int:
        return places.isolated(_job(space, **sweep), Session(own, (Resources(8, 0),), None))[1]

    assert (runs(True, trials=20), runs(False, trials=20)) == (4, 8)
    # Who says how many means it.
    assert runs(True, trials=20, concurrent=6) == 6


def test_a_group_grows_to_no_more_workers_than_have_a_trial() -> None:
    def workers(workers: Any, count: int) -> Any:
        return places.with_trials_for_all(WorkerPlan(workers, 1, 1, 1), count).workers

    assert [workers((2, 16), count) for count in (2, 4, 32)] == [2, (2, 4), (2, 16)]
    assert workers(4, 8) == 4


def test_isolated_trials_wait_for_what_an_autoscaler_adds() -> None:
    space = {"data.max_length": {"choice": [256, 512]}}
    there = Session(False, (Resources(0, 0),), (Resources(80, 10),))
    plan, count = places.isolated(_job(space, concurrent=4), there)
    assert (plan.gpus, count) == (1, 4)
    plan, count = places.isolated(_job(space, trials=20), there)
    assert (plan.gpus, count) == (1, 10)
    # With some nodes there it does not count on others.
    some = Session(False, (Resources(16, 2),), (Resources(80, 10),))
    assert places.isolated(_job(space, trials=20), some)[1] == 2
    assert places.isolated(_job(space, concurrent=4), some)[1] == 4
