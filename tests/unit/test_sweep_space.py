"""What may be searched, and what becomes of it."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import JobConfig
from orchestrator.errors import RefusedError
from orchestrator.jobfile import job_from_mapping
from orchestrator.sweep import space

RANKS = {"lora.rank": {"choice": [4, 8]}}
RATES = {"training.learning_rate": {"choice": [1e-4, 1e-3]}}


def _job(search_space: dict[str, Any], **sweep: Any) -> JobConfig:
    return job_from_mapping(
        {
            "name": "s",
            "model": {"base": "b"},
            "data": {"train": "t.jsonl"},
            "training": {"max_steps": 20},
            "sweep": {"search_space": search_space, **sweep},
        }
    )


@pytest.mark.parametrize(
    ("search_space", "sweep", "word"),
    [
        ({}, {}, "empty"),
        ({"lora.rnak": {"choice": [1]}}, {}, "lora.rank"),
        ({"lora.rank": {"choice": [8, -1]}}, {}, "lora.rank"),
        # What the searcher would give is no whole number.
        ({"lora.rank": {"uniform": [4, 8]}}, {}, "lora.rank"),
        ({"output_dir": {"choice": ["a", "b"]}}, {}, "output_dir"),
        ({"lora": {"choice": [{"rank": 4}, {"rank": 8}]}}, {}, "lora is a section"),
        ({"training.warmup_steps": {"int": [0, 50]}}, {}, "training.warmup_steps"),
        (
            {"training.warmup_steps": {"choice": [0, 15]}, "training.max_steps": {"int": [10, 30]}},
            {},
            "training.warmup_steps=15, training.max_steps=10",
        ),
        (RANKS, {"points": [{"lora.alpha": 1}]}, "points[0]"),
        (RANKS, {"points": [{"lora.rank": 0}]}, "points[0]"),
        (RANKS, {"points": [{"lora.rank": 16}]}, "points[0]: lora.rank is 16, which is not in"),
        ({"lora.alpha": {"uniform": [1, 2]}}, {"points": [{"lora.alpha": 3}]}, "lora.alpha is 3"),
        # The bad pair comes after a thousand good combinations.
        (
            {
                "training.warmup_steps": {"choice": [0, 15]},
                "training.max_steps": {"choice": [20, 10]},
                "training.batch_size": {"choice": list(range(1, 33))},
                "lora.rank": {"choice": list(range(1, 33))},
            },
            {},
            "training.warmup_steps=15, training.max_steps=10",
        ),
        (RANKS, {"searcher": "grid", "trials": 1}, "2 points"),
        ({"lora.alpha": {"uniform": [1, 2]}}, {"searcher": "grid"}, "is a range"),
        (RANKS, {"scheduler": "pbt"}, "learning_rate"),
        (RATES, {"scheduler": "pbt", "searcher": "optuna"}, "goes with random only"),
        ({**RATES, "data.max_length": {"choice": [8, 16]}}, {"scheduler": "pbt"}, "moves adapters"),
        ({"data.max_length": {"choice": [8, 16]}}, {"placement": "shared"}, "placement"),
    ],
)
def test_refused(search_space: dict[str, Any], sweep: dict[str, Any], word: str) -> None:
    with pytest.raises(RefusedError, match=word.replace("[", r"\[").replace("]", r"\]")):
        space.check(_job(search_space, **sweep))


@pytest.mark.parametrize(
    ("search_space", "sweep", "shared"),
    [
        (RANKS, {}, True),
        (
            {"training.batch_size": {"choice": [2, 4]}, "lora.dropout": {"uniform": [0, 0.5]}},
            {},
            True,
        ),
        (RANKS, {"placement": "isolated"}, False),
        ({**RANKS, "data.max_length": {"choice": [8, 16]}}, {}, False),
        ({"quantization.type": {"choice": ["nf4", "fp4"]}}, {}, False),
        # The budget of a pass is the engine's, not the adapter's.
        ({"training.tokens_per_pass": {"choice": [256, 512]}}, {}, False),
    ],
)
def test_trials_share_a_base_where_only_the_adapter_differs(
    search_space: dict[str, Any], sweep: dict[str, Any], shared: bool
) -> None:
    job = _job(search_space, **sweep)
    space.check(job)
    assert space.is_shared(job) is shared


def test_without_held_out_rows_only_the_training_loss_is_reported() -> None:
    job = _job(RANKS)
    unheld = job.model_copy(update={"data": job.data.model_copy(update={"validation": None})})
    with pytest.raises(RefusedError, match="nothing reports eval_loss"):
        space.check(unheld)


def test_a_trial_is_a_fine_tune_of_its_own_and_the_best_one_a_job_file() -> None:
    job = _job(RANKS)
    trial = space.trial_job(job, "t1", Path("/there"), {"lora.rank": 8}, "sqlite:///s.db")
    assert (trial.name, trial.output_dir, trial.lora.rank) == ("t1", "/there", 8)
    assert trial.sweep is None and trial.tracking.uri == "sqlite:///s.db"
    best = space.best_job(job, {"lora.rank": 8})
    assert best.sweep is None and best.lora.rank == 8 and best.name == "s-best"


def test_a_grid_is_mixed_for_a_scheduler_that_compares_with_those_before() -> None:
    values = [1e-4, 3e-4, 1e-3, 3e-3]
    orders = {}
    for scheduler in ("none", "asha"):
        sweep = _job(RANKS, searcher="grid", trials=4, scheduler=scheduler).sweep
        assert sweep is not None
        orders[scheduler] = space.grid_order(sweep, values)
        assert space.grid_order(sweep, values) == orders[scheduler]
    assert orders["none"] == values
    assert orders["asha"] != values and sorted(orders["asha"]) == values


def test_the_fastest_trial_is_the_best_unless_said() -> None:
    by_speed = _job(RANKS, metric="tokens_per_second").sweep
    slowest = _job(RANKS, metric="tokens_per_second", mode="min").sweep
    by_loss = _job(RANKS).sweep
    assert by_speed and slowest and by_loss
    assert (by_speed.mode, slowest.mode, by_loss.mode) == ("max", "min", "min")
