"""The policy of a Ray of the command's own."""

import asyncio
from types import SimpleNamespace
from typing import Any

import ray.train
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from orchestrator.cluster.alone import NothingToAskFor


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
