"""What Ray Train does otherwise on a Ray of the command's own."""

import asyncio
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from orchestrator.cluster.alone import Control, NothingToAskFor

# With it Ray Train's controller sets up Python's logging, which closes the process's handlers.
OWN_LOGGING = "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING"
CONTROLLER = "orchestrator.cluster.alone._Controller"


class Endless:
    """A controller whose workers never end."""

    began = threading.Event()

    async def run(self) -> None:
        self.began.set()
        while True:
            await asyncio.sleep(0.01)


class Telling:
    """A controller that says something, and is done."""

    async def run(self) -> None:
        logging.getLogger("ray.train").error("for the log only")

    def get_result(self) -> str:
        return os.environ[OWN_LOGGING]


def test_a_fixed_group_asks_no_autoscaler() -> None:
    config = ray.train.ScalingConfig(num_workers=3, resources_per_worker={"CPU": 1.0})
    policy = NothingToAskFor(config)
    group: Any = SimpleNamespace()
    policy.after_controller_start(SimpleNamespace(run_id="run"))
    assert policy.make_decision_for_non_running_worker_group() == ResizeDecision(3, {"CPU": 1.0})
    assert policy.make_decision_for_running_worker_group(group, group) == NoopDecision()
    policy.before_controller_abort()
    asyncio.run(policy.before_controller_shutdown())
    # What would have asked is never made.
    assert policy._coordinator_client is None
    assert not ray.is_initialized()


def test_a_controller_that_is_ended_goes_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONTROLLER, Endless)
    control = Control()
    # Before it runs there is nothing to end.
    control.end()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(control.run, {})
        assert Endless.began.wait(10)
        control.end()
        assert isinstance(running.exception(timeout=10), asyncio.CancelledError)
    # Nor afterwards.
    control.end()


def test_a_controller_leaves_pythons_logging_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CONTROLLER, Telling)
    monkeypatch.delenv(OWN_LOGGING, raising=False)
    logger = logging.getLogger("ray.train")
    before = list(logger.handlers), logger.level, logger.propagate
    assert Control().run({}) == "0"
    assert (logger.handlers, logger.level, logger.propagate) == before
    assert OWN_LOGGING not in os.environ
    assert "for the log only" not in "".join(capfd.readouterr())
