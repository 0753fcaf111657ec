"""How many workers an elastic run has, by the room on the nodes that live at that moment."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision
from ray.train.v2._internal.util import time_monotonic
from ray.util import placement_group_table
from tenacity import Retrying, retry_if_result
from tenacity.stop import stop_after_delay
from tenacity.wait import wait_fixed

from orchestrator.cluster.plan import places
from orchestrator.errors import InterruptedRunError, OrchestratorError
from orchestrator.tracking.observer import stop_path

STOPPED = "Stopped while the job waited for its workers. Run the same command again to go on"
# Ray calls a node dead after five health checks that failed, each after ten seconds at the most.
_NOTICE_SECONDS = 90.0
_ANSWER_SECONDS = 5.0
# Between looks for room; what ended workers leave Ray counts as free a moment later.
_PAUSE_SECONDS = 1.0


class LivingNodes(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray Train's own policy, but for the room that there is. Lives in its controller.

    Ray Train counts what a coordinator deals out to all that ask. That counts the nodes of a list
    of up to 20 seconds ago, those that died since, those that drain and what other jobs use
    included; a run that was killed holds its share for three minutes. It would ask for workers that
    find no room, and wait for them in vain until the start times out; to grow in vain it would even
    end workers that train. A worker that loses its peer ends at once, long before Ray misses the
    peer's node. The coordinator passes on to an autoscaler what a run could use, and only that.
    """

    def __init__(self, scaling_config: Any, run_dir: Path, patience: float) -> None:
        """A run in `run_dir` that waits `patience` seconds for room for its fewest workers."""
        super().__init__(scaling_config)
        self._run_dir, self._patience = run_dir, patience
        self._each = scaling_config._resources_per_worker_not_none
        self._workers: Sequence[Any] = ()
        self._group: Any = None
        self._waits_since: float | None = None
        self._looked = float("-inf")

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Grow where there is room for more; who dies is noticed elsewhere."""
        self._workers = worker_group_state.workers
        self._group = worker_group_state.placement_group_handle.placement_group
        self._maybe_send_resource_request()
        looked = max(worker_group_state.start_time, self._looked)
        if time_monotonic() - looked < self.scaling_config.elastic_resize_monitor_interval_s:
            return NoopDecision()
        self._looked = time_monotonic()
        workers = self._possible()
        return self._start(workers) if workers > len(self._workers) else NoopDecision()

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Start with as many workers as find room, or wait until the fewest do.

        Raises:
            InterruptedRunError: the user asked to stop meanwhile.
            OrchestratorError: they found none for too long.
        """
        self._check_wait()
        time.sleep(_PAUSE_SECONDS)
        self._maybe_send_resource_request()
        _wait_for_news(self._workers)
        workers = self._possible()
        if workers < self.scaling_config.min_workers:
            return NoopDecision()
        self._waits_since = None
        return self._start(workers)

    def _possible(self) -> int:
        return min(self.scaling_config.max_workers, _room(self._group, self._each))

    def _start(self, workers: int) -> Any:
        # The last group's place is given back before the next one is started.
        self._workers, self._group = (), None
        return self._get_resize_decision(workers)

    def _check_wait(self) -> None:
        if stop_path(self._run_dir).exists():
            raise InterruptedRunError(STOPPED)
        now = time.monotonic()
        if self._waits_since is None:
            self._waits_since = now
        if now - self._waits_since > self._patience:
            least = self.scaling_config.min_workers
            raise OrchestratorError(
                f"cluster.workers: fewer than {least} workers found room within "
                f"{self._patience:g} seconds. Add nodes, or wait until others have ended, and run "
                "the same command again to go on; or let the job go on with fewer"
            )


def _wait_for_news(workers: Sequence[Any]) -> None:
    """Until each worker answers, or is known to be dead and its node with it."""
    retrying = Retrying(
        retry=retry_if_result(lambda known: not known),
        stop=stop_after_delay(_NOTICE_SECONDS),
        wait=wait_fixed(0.5),
        # Who only hangs has a node that lives.
        retry_error_callback=lambda _: None,
    )
    retrying(lambda: all(_is_known(worker.actor) for worker in workers))


def _is_known(actor: Any) -> bool:
    """Whether a worker answers or is dead; one that is unavailable may be either."""
    try:
        ray.get(actor.__ray_ready__.remote(), timeout=_ANSWER_SECONDS)
    except (ActorUnavailableError, GetTimeoutError):
        return False
    except RayActorError:
        return True
    return True


def _room(group: Any, each: Mapping[str, float]) -> int:
    """How many workers find room on nodes that live and are not about to go away.

    Args:
        group: the run's own placement group, a bundle for each worker, whose place counts as free.
            That is where Ray keeps it: when a node has died, a bundle moves to any other with room.
        each: the resources of one worker.
    """
    from ray._private.state import state

    kept = [] if group is None else placement_group_table(group)["bundles_to_node_id"].values()
    ours = Counter(kept)
    leaving, free = state.get_draining_nodes(), state.available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        name, has = node["NodeID"], node["Resources"]
        if node["Alive"] and name not in leaving:
            left = free.get(name, {})
            nodes.append(
                {
                    kind: min(has.get(kind, 0.0), left.get(kind, 0.0) + ours[name] * amount)
                    for kind, amount in each.items()
                }
            )
    return places(nodes, each)
