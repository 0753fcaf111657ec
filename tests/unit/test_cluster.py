"""Parts of the driver and of the observers that need no running Ray."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster import driver, observer
from orchestrator.cluster.plan import WorkerPlan
from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.tracking.journal import Journal, journal_path

TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def test_the_start_timeout_of_one_run_does_not_reach_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(TIMEOUT, raising=False)
    with driver._start_timeout(1800):
        assert os.environ[TIMEOUT] == "1800"
    assert TIMEOUT not in os.environ


def test_the_start_timeout_that_the_user_sets_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT, "77")
    with driver._start_timeout(1800):
        assert os.environ[TIMEOUT] == "77"
    assert os.environ[TIMEOUT] == "77"


@pytest.mark.parametrize("grows", [False, True])
def test_an_elastic_run_asks_more_often_and_waits_as_long_in_all(grows: bool) -> None:
    def waited(workers: Any) -> tuple[int, int]:
        seconds, retries = driver._patience(WorkerPlan(workers, 0, 1, 1), grows)
        return seconds, seconds * retries

    fixed, elastic = waited(2), waited((1, 2))
    assert elastic[0] == 60 < fixed[0] and elastic[1] == fixed[1]


def test_a_release_of_ray_that_keeps_its_notices_elsewhere_only_costs_the_notice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray.train.v2._internal.execution.context", None)
    drain = observer._Drain()
    assert not drain.heard and not drain.noticed()


def test_a_run_is_refused_only_before_its_first_step(tmp_path: Path) -> None:
    refused = RefusedError("output_dir: s3://runs/a cannot be read on node b")
    with pytest.raises(RefusedError):
        driver.result(refused, tmp_path)
    with Journal(journal_path(tmp_path)) as journal:
        journal.append("step", step=1, loss=2.0)
    with pytest.raises(OrchestratorError, match="cannot be read") as raised:
        driver.result(refused, tmp_path)
    assert not isinstance(raised.value, RefusedError)
    assert driver.result({"status": "finished"}, tmp_path) == {"status": "finished"}
