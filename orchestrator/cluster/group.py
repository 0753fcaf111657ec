"""How the workers of a Ray Train run form a group of torch's, over gloo.

By Ray Train's own functions, called on the workers alone: its `TorchConfig` has the command and the
controller import torch as well, two seconds of a start on two cores and 200 MB of each.
"""

import os
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.ray_constants import env_integer
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.constants import (
    DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
    TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
)


@dataclass
class GlooGroup(BackendConfig):  # type: ignore[misc]
    """A group whose operations wait so many seconds for a silent worker."""

    timeout: int

    @property
    def backend_cls(self) -> type[Backend]:
        """What forms it."""
        return _Gloo


class _Gloo(Backend):  # type: ignore[misc]
    # NCCL finds a machine's other GPUs only where each worker sees all of them.
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: GlooGroup) -> None:
        """All workers meet at the first one's address."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        size = len(worker_group)
        # All have imported torch before any of them waits for the others.
        worker_group.execute(prepare, address, port)
        seconds = backend_config.timeout
        ray.get([worker_group.execute_single_async(i, join, i, size, seconds) for i in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: GlooGroup) -> None:
        """They leave it; who does not in time is ended all the same."""
        seconds = env_integer(
            TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
        )
        try:
            ray.get(worker_group.execute_async(leave, len(worker_group) > 1), timeout=seconds)
        except GetTimeoutError:
            return


def prepare(address: str, port: int) -> None:
    """Learn where the group meets; called on a worker."""
    from ray.train.torch.config import _set_torch_distributed_env_vars

    # Whatever of torch must be there before a group is formed.
    import orchestrator.training.collective  # noqa: F401

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    _set_torch_distributed_env_vars()


def join(rank: int, size: int, timeout: int) -> None:
    """Become one of a group; called on a worker."""
    from ray.train.torch.config import _setup_torch_process_group

    _setup_torch_process_group("gloo", rank, size, "env://", timeout)


def leave(several: bool) -> None:
    """Leave the group and return what a GPU has cached; called on a worker."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=several)
