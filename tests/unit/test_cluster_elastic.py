"""How many workers an elastic run has, by what lives, drains and is used by others."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray._private.state import state
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from orchestrator.cluster import elastic
from orchestrator.cluster.elastic import LivingNodes
from orchestrator.errors import InterruptedRunError, OrchestratorError
from orchestrator.tracking.observer import stop_path

EACH = {"CPU": 1.0, "GPU": 1.0}
HAS = {"CPU": 8.0, "GPU": 2.0}
# Ray leaves out what there is none of.
ALL_USED = {"CPU": 6.0}


class Cluster:
    """Nodes a and b with two GPUs each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive = {"a": True, "b": True}
        self.free = {"a": HAS, "b": HAS}
        self.draining: set[str] = set()
        monkeypatch.setattr(ray, "nodes", self._nodes)
        monkeypatch.setattr(type(state), "available_resources_per_node", lambda _: self.free)
        monkeypatch.setattr(type(state), "get_draining_nodes", lambda _: self.draining)
        monkeypatch.setattr(elastic, "_is_known", lambda actor: True)
        monkeypatch.setattr(elastic, "_PAUSE_SECONDS", 0.0)
        monkeypatch.setattr(LivingNodes, "_maybe_send_resource_request", lambda _: None)
        monkeypatch.setattr(elastic, "placement_group_table", lambda bundles: bundles)

    def _nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": n, "Alive": live, "Resources": HAS} for n, live in self.alive.items()]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def policy(folder: Path, least: int = 1, patience: float = 60.0) -> LivingNodes:
    scaling = ray.train.ScalingConfig(
        num_workers=(least, 4),
        use_gpu=True,
        resources_per_worker=EACH,
        elastic_resize_monitor_interval_s=0.0,
    )
    return LivingNodes(scaling, folder, patience)


def started(decision: Any) -> int:
    """0: nothing is started."""
    return decision.num_workers if isinstance(decision, ResizeDecision) else 0


def running(policy: LivingNodes, *nodes: str) -> int:
    """What the policy says to a group with a worker on each of these nodes."""
    workers = [SimpleNamespace(actor=None) for _ in nodes]
    bundles = {"bundles_to_node_id": dict(enumerate(nodes))}
    place = SimpleNamespace(placement_group=bundles)
    group = SimpleNamespace(workers=workers, start_time=0.0, placement_group_handle=place)
    decision = policy.make_decision_for_running_worker_group(group, None)
    assert isinstance(decision, NoopDecision) or decision.resources_per_worker == EACH
    return started(decision)


def test_a_run_starts_with_the_workers_that_find_room(cluster: Cluster, tmp_path: Path) -> None:
    start = policy(tmp_path).make_decision_for_non_running_worker_group
    assert started(start()) == 4
    cluster.free = {"a": ALL_USED, "b": HAS}
    assert started(start()) == 2, "others use the GPUs of a"
    cluster.free, cluster.draining = {"a": HAS, "b": HAS}, {"b"}
    assert started(start()) == 2, "b is about to go away"
    cluster.draining, cluster.alive = set(), {"a": True, "b": False}
    assert started(start()) == 2, "b is dead"


def test_a_run_that_trains_grows_into_room_only(cluster: Cluster, tmp_path: Path) -> None:
    grown = policy(tmp_path)
    cluster.free = {"a": ALL_USED, "b": {"CPU": 6.0, "GPU": 1.0}}
    assert running(grown, "a", "a", "b") == 4
    cluster.free = {"a": ALL_USED, "b": ALL_USED}
    # Ray Train itself would end the three to wait for a fourth.
    assert running(grown, "a", "a", "b") == 0, "another job has b's other GPU"
    cluster.alive = {"a": True, "b": False}
    assert running(grown, "a", "a", "b") == 0, "who dies is noticed elsewhere"


def test_the_place_of_the_last_group_counts_once(cluster: Cluster, tmp_path: Path) -> None:
    again = policy(tmp_path)
    cluster.free = {"a": ALL_USED, "b": ALL_USED}
    assert running(again, "a", "a", "b", "b") == 0
    cluster.alive = {"a": True, "b": False}
    assert started(again.make_decision_for_non_running_worker_group()) == 2
    # They did not start, and by now another job has what they had.
    assert started(again.make_decision_for_non_running_worker_group()) == 0


def test_a_bundle_that_moved_to_another_node_is_still_the_runs_own(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Ray moves those of a node that died, and the run would wait for its own place."""
    again = policy(tmp_path, least=3)
    cluster.alive = {"a": True, "b": True, "c": True}
    cluster.free = {"a": ALL_USED, "b": ALL_USED, "c": HAS}
    assert running(again, "a", "a", "b") == 4
    table = {"bundles_to_node_id": {0: "a", 1: "a", 2: "b"}}
    place = SimpleNamespace(placement_group=table)
    group = SimpleNamespace(
        workers=[SimpleNamespace(actor=None)] * 3, start_time=0.0, placement_group_handle=place
    )
    cluster.free["c"] = ALL_USED
    again.make_decision_for_running_worker_group(group, None)
    cluster.alive["b"], cluster.free["c"] = False, {"CPU": 7.0, "GPU": 0.0}
    assert started(again.make_decision_for_non_running_worker_group()) == 0
    table["bundles_to_node_id"][2] = "c"
    assert started(again.make_decision_for_non_running_worker_group()) == 3


def test_a_group_that_grows_gives_its_place_back_once(cluster: Cluster, tmp_path: Path) -> None:
    grown = policy(tmp_path)
    cluster.free = {"a": ALL_USED, "b": HAS}
    assert running(grown, "a", "a") == 4
    # It did not start, for by now another job has b.
    cluster.free = {"a": HAS, "b": ALL_USED}
    assert started(grown.make_decision_for_non_running_worker_group()) == 2


def test_shares_of_a_gpu_are_counted_whole(cluster: Cluster, tmp_path: Path) -> None:
    """A fifth fits five times, though 1.0 // 0.2 is 4."""
    each = {"CPU": 0.1, "GPU": 0.2}
    scaling = ray.train.ScalingConfig(num_workers=(20, 20), use_gpu=True, resources_per_worker=each)
    shares = LivingNodes(scaling, tmp_path, 60.0)
    assert started(shares.make_decision_for_non_running_worker_group()) == 20


def test_fewer_than_the_least_wait_until_the_user_stops_them(
    cluster: Cluster, tmp_path: Path
) -> None:
    waits = policy(tmp_path, least=3)
    cluster.alive = {"a": True, "b": False}
    assert started(waits.make_decision_for_non_running_worker_group()) == 0
    stop_path(tmp_path).touch()
    with pytest.raises(InterruptedRunError, match="same command again"):
        waits.make_decision_for_non_running_worker_group()


def test_fewer_than_the_least_wait_until_patience_ends(cluster: Cluster, tmp_path: Path) -> None:
    waits = policy(tmp_path, least=3, patience=0.0)
    assert started(waits.make_decision_for_non_running_worker_group()) == 3 + 1
    cluster.alive = {"a": True, "b": False}
    waits.make_decision_for_non_running_worker_group()
    with pytest.raises(OrchestratorError, match="fewer than 3 workers found room within 0 seconds"):
        waits.make_decision_for_non_running_worker_group()
