"""A group of workers that is about to meet, and one that dies in it."""

import os
from collections.abc import Callable

import psutil
import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError

from orchestrator.cluster import forming
from orchestrator.cluster.forming import Forming, StartsAgain


class Group:
    """Ray Train's, as far as it is used."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def execute(self, work: Callable[[], None]) -> None:
        self.did.append(work.__name__)

    def abort(self) -> None:
        self.did.append("abort")


class Room:
    """The failed starts that Ray Train repeats."""

    max_failures, max_preemption_failures, controller_failure_limit = 0, -1, 1


def _start(group: Group, error: Exception | None = None) -> None:
    callback = Forming()
    with callback.on_worker_group_start():
        callback.after_worker_group_start(group)
        if error:
            raise error


@pytest.mark.parametrize(
    "error",
    [
        # Ray Train's for a worker that is gone, and what its peer says.
        WorkerGroupStartupFailedError("one failed to initialize"),
        RuntimeError("Connection closed by peer"),
    ],
)
def test_a_group_that_does_not_meet_gives_its_place_back_and_is_tried_again(
    error: Exception,
) -> None:
    group = Group()
    with pytest.raises(WorkerGroupStartupFailedError, match=str(error)):
        _start(group, error)
    assert group.did == ["name_interface", "abort"]


def test_a_group_that_meets_is_left_alone() -> None:
    group = Group()
    _start(group)
    assert group.did == ["name_interface"]


def test_a_worker_that_dies_while_it_is_handed_its_function_is_a_failed_start() -> None:
    group, callback, policy = Group(), Forming(), StartsAgain(Room())
    died = ControllerError(RayActorError(error_msg="killed"))
    with callback.on_worker_group_start():
        callback.after_worker_group_start(group)
    # Here Ray hands it out, and raises.
    decided = policy.make_decision(died)
    callback.before_controller_execute_failure_decision(decided)
    assert decided == FailureDecision.RETRY and group.did == ["name_interface", "abort"]
    assert policy.make_decision(died) == FailureDecision.RAISE
    assert policy.make_decision(ControllerError(ImportError("no torch"))) == FailureDecision.RAISE

    # Who works is ended by Ray Train itself.
    works = Group()
    with callback.on_worker_group_start():
        callback.after_worker_group_start(works)
    callback.after_worker_group_training_start(works)
    callback.before_controller_execute_failure_decision(decided)
    assert works.did == ["name_interface"]


def test_what_another_try_would_not_mend_is_not_tried_again() -> None:
    group = Group()
    with pytest.raises(ImportError):
        _start(group, ImportError("no torch"))


def test_a_group_that_found_no_room_has_no_place_to_give_back() -> None:
    callback = Forming()
    with pytest.raises(WorkerGroupStartupTimeoutError), callback.on_worker_group_start():
        raise WorkerGroupStartupTimeoutError(2)


def test_gloo_is_told_the_interface_by_which_ray_knows_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "before")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    (name,) = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == "127.0.0.1" for address in addresses)
    ]
    monkeypatch.setattr(forming, "get_node_ip_address", lambda: "192.0.2.1")
    forming.name_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "no interface has that address"
    monkeypatch.setattr(forming, "get_node_ip_address", lambda: "127.0.0.1")
    forming.name_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == name
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    forming.name_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7", "the user's own word stands"
