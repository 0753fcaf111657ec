"""How many workers an elastic run starts with, by the nodes that live at that moment."""

from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from tenacity import Retrying, retry_if_result
from tenacity.stop import stop_after_delay
from tenacity.wait import wait_fixed

from orchestrator.cluster.plan import places

# Ray calls a node dead after five health checks that failed, each after ten seconds at the most.
_NOTICE_SECONDS = 90.0
_ANSWER_SECONDS = 5.0


class LivingNodes(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Keeps Ray Train from asking for workers on nodes that are gone. Lives in its controller.

    A worker that loses its peer ends at once, long before Ray misses the peer's node, and Ray Train
    sizes the next workers by a list of nodes of up to 20 seconds ago, draining ones included. It
    would ask for as many workers as before, and wait for them in vain until the start times out.
    """

    def __init__(self, least: int) -> None:
        """With fewer workers than `least` the run does not go on."""
        self._least = least
        self._workers: list[Any] = []

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember who is asked later."""
        self._workers = [worker.actor for worker in worker_group.get_workers()]

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Lower the number of workers to what nodes that live and stay can hold."""
        _wait_for_news(self._workers)
        held = places(_lasting_nodes(), resize_decision.resources_per_worker)
        resize_decision.num_workers = max(self._least, min(resize_decision.num_workers, held))


def _wait_for_news(workers: list[Any]) -> None:
    """Until each worker answers, or is known to be dead and its node with it."""
    retrying = Retrying(
        retry=retry_if_result(lambda known: not known),
        stop=stop_after_delay(_NOTICE_SECONDS),
        wait=wait_fixed(0.5),
        # Who only hangs has a node that lives.
        retry_error_callback=lambda _: None,
    )
    retrying(lambda: all(map(_is_known, workers)))


def _is_known(worker: Any) -> bool:
    """Whether a worker answers or is dead; one that is unavailable may be either."""
    try:
        ray.get(worker.__ray_ready__.remote(), timeout=_ANSWER_SECONDS)
    except (ActorUnavailableError, GetTimeoutError):
        return False
    except RayActorError:
        return True
    return True


def _lasting_nodes() -> list[dict[str, float]]:
    """Resources of each node that lives and is not about to go away."""
    from ray._private.state import state

    leaving = state.get_draining_nodes()
    return [
        node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving
    ]
