"""How a group of workers forms, in Ray Train's controller: tried again where one dies in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
from ray.train.v2.api.exceptions import ControllerError
from ray.util import get_node_ip_address

_INTERFACE = "GLOO_SOCKET_IFNAME"


class Forming(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Counts what ends a group that does not work yet as a failed start, which Ray Train repeats.

    Without it such a group keeps its place, for Ray Train takes it for one that has started, and
    where another worker tells of the death first, with an error of torch's, the run ends.
    It has to come before the callback that lets the workers meet.
    """

    def __init__(self) -> None:
        """No group forms yet."""
        self._group: Any = None

    @contextmanager
    def on_worker_group_start(self) -> Iterator[None]:
        """Around all of a start but the call of the workers' function."""
        self._group = None
        try:
            yield
        # What torch raises where a peer is gone, or a port was taken meanwhile, is the latter.
        except (WorkerGroupStartupFailedError, RuntimeError) as error:
            self._give_back()
            raise WorkerGroupStartupFailedError(str(error)) from error

    def after_worker_group_start(self, worker_group: Any) -> None:
        """The workers are there, and are about to meet."""
        self._group = worker_group
        worker_group.execute(name_interface)

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """All have their function."""
        self._group = None

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """One died while it was handed the function: Ray Train forgets the others."""
        self._give_back()

    def _give_back(self) -> None:
        """End a group that does not work yet, and free its place."""
        if self._group is not None:
            self._group.abort()
            self._group = None


class StartsAgain(DefaultFailurePolicy):  # type: ignore[misc]
    """Counts the death of a worker that is handed its function as a failed start too."""

    def make_decision(self, training_failed_error: Any) -> Any:
        """Whether to try again."""
        cause = getattr(training_failed_error, "controller_failure", None)
        if isinstance(cause, RayActorError):
            failed_start = WorkerGroupStartupFailedError(str(cause))
            training_failed_error = ControllerError(failed_start)
        return super().make_decision(training_failed_error)


def name_interface() -> None:
    """Let gloo use the address by which Ray knows this machine.

    By itself it takes what the machine's name stands for: on Debian 127.0.1.1, where each finds
    only itself.
    """
    here = get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == here for address in addresses):
            os.environ.setdefault(_INTERFACE, name)
