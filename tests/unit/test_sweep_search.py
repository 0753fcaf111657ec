"""What Ray Tune is told of a job's sweep."""

from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers.pbt import _explore

from orchestrator.cluster.plan import Resources
from orchestrator.cluster.session import Session
from orchestrator.config import JobConfig
from orchestrator.sweep import places, search
from tests.unit.sweeps import sweep_job

RATE = "training.learning_rate"


def _job(search_space: dict[str, Any], **sweep: Any) -> JobConfig:
    return sweep_job(Path("there"), search_space, max_steps=50, **sweep)


@pytest.mark.parametrize(
    ("steps", "most"), [([20, 200, 100], 200), ([50, None], 10**6), (None, 50)]
)
def test_asha_lets_the_longest_trial_end(steps: list[int | None] | None, most: int) -> None:
    space = {"lora.rank": {"choice": [4]}}
    job = _job(space if steps is None else {"training.max_steps": {"choice": steps}})
    assert job.sweep is not None
    assert search.scheduler(job, job.sweep)._max_t == most


@pytest.mark.parametrize(
    ("domain", "allowed"),
    [
        ({"choice": [1e-4, 3e-4, 1e-3]}, lambda rate: rate in (1e-4, 3e-4, 1e-3)),
        ({"loguniform": [1e-4, 1e-3]}, lambda rate: 1e-4 <= rate <= 1e-3),
    ],
)
def test_a_population_stays_in_the_search_space(domain: dict[str, Any], allowed: Any) -> None:
    job = _job({RATE: domain}, scheduler="pbt", searcher="random")
    assert job.sweep is not None
    chosen, rates = search.scheduler(job, job.sweep), [3e-4]
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


def test_isolated_trials_wait_for_what_an_autoscaler_adds() -> None:
    space = {"data.max_length": {"choice": [256, 512]}}
    there = Session(False, (Resources(0, 0),), Resources(80, 10))
    plan, count = places.isolated(_job(space, concurrent=4), there)
    assert (plan.gpus, count) == (1, 4)
    plan, count = places.isolated(_job(space, trials=20), there)
    assert (plan.gpus, count) == (1, 10)
    # With some nodes there it does not count on others.
    some = Session(False, (Resources(16, 2),), Resources(80, 10))
    assert places.isolated(_job(space, trials=20), some)[1] == 2
    assert places.isolated(_job(space, concurrent=4), some)[1] == 4
