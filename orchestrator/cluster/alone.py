"""A fixed number of workers on a Ray of the command's own, which no autoscaler serves."""

from typing import Any

from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy


class NothingToAskFor(FixedScalingPolicy):  # type: ignore[misc]
    """Ray Train's own policy, but that it asks no autoscaler for the workers' resources.

    Ray Train starts a process that passes such wishes on, before its workers: three seconds of a
    start on two cores, and one more process that wakes all the time.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Make no wish."""

    def _maybe_send_resource_request(self) -> None:
        return
