"""Adapters that cannot fit are left out of a search, and it is told."""

import pytest

from orchestrator.config import JobConfig
from orchestrator.errors import RefusedError
from orchestrator.jobfile import job_from_mapping
from orchestrator.sweep.fitting import leave_out, left_out


def _job(**sweep: object) -> JobConfig:
    return job_from_mapping(
        {"name": "s", "model": {"base": "b"}, "data": {"train": "t.jsonl"}, "sweep": sweep}
    )


def _up_to_64(job: JobConfig) -> str | None:
    return None if job.lora.rank <= 64 else f"rank {job.lora.rank} takes too much"


def test_values_and_points_that_cannot_fit_are_left_out_and_told() -> None:
    said: list[str] = []
    job = _job(
        search_space={"lora.rank": {"choice": [8, 64, 512]}, "lora.alpha": {"uniform": [1, 9]}},
        points=[{"lora.rank": 8, "lora.alpha": 2.0}, {"lora.rank": 512, "lora.alpha": 2.0}],
    )
    sweep = leave_out(job, _up_to_64, said.append).sweep
    assert sweep is not None
    assert sweep.search_space["lora.rank"] == {"choice": [8, 64]}
    assert sweep.search_space["lora.alpha"] == {"uniform": [1, 9]}
    assert [point["lora.rank"] for point in sweep.points] == [8]
    assert "512 left out. rank 512 takes too much" in said[0] and "sweep.points: 1" in said[1]
    # A searcher that was begun where more fitted still proposes it.
    assert "lora.rank=512 does not fit" in str(left_out(sweep, {"lora.rank": 512}))
    assert left_out(sweep, {"lora.rank": 64, "lora.alpha": 2.0}) is None


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [([4, 1000], {"int": [4, 64]}), ([64, 1000], {"choice": [64]}), ([4, 64], {"int": [4, 64]})],
)
def test_a_range_ends_at_the_largest_that_fits(
    bounds: list[int], expected: dict[str, list[int]]
) -> None:
    job = _job(search_space={"lora.rank": {"int": bounds}})
    sweep = leave_out(job, _up_to_64, lambda _: None).sweep
    assert sweep is not None and sweep.search_space["lora.rank"] == expected


def test_where_nothing_fits_the_sweep_is_refused() -> None:
    job = _job(search_space={"lora.rank": {"choice": [128, 256]}})
    with pytest.raises(RefusedError, match="no value fits"):
        leave_out(job, _up_to_64, lambda _: None)


def test_ranks_below_one_that_fits_are_not_planned() -> None:
    asked: list[int] = []

    def reason(job: JobConfig) -> str | None:
        asked.append(job.lora.rank)
        return _up_to_64(job)

    leave_out(_job(search_space={"lora.rank": {"choice": [8, 64, 512]}}), reason, lambda _: None)
    assert asked == [512, 64]
