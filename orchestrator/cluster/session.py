"""Joining a Ray cluster, or starting Ray on this machine."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from orchestrator.errors import OrchestratorError, RefusedError


@dataclass(frozen=True)
class Session:
    """A Ray session. `own` is True where this process started Ray for itself."""

    own: bool
    cpus: float
    gpus: float


@contextmanager
def session(address: str) -> Iterator[Session]:
    """Connect to `address`; `auto` joins this machine's cluster or starts Ray here.

    Raises:
        RefusedError: an address was given and no cluster answers there.
        OrchestratorError: Ray does not start.
    """
    own = _connect(address)
    try:
        resources = ray.cluster_resources()
        yield Session(own, resources.get("CPU", 0), resources.get("GPU", 0))
    finally:
        ray.shutdown()


def _connect(address: str) -> bool:
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address != "local":
        try:
            ray.init(address=address, **options)
            return False
        except ConnectionError as error:
            if address != "auto":
                raise RefusedError(
                    f"cluster.address: no Ray cluster answers at {address} ({error}). Start one "
                    "with `ray start --head`, or take auto or local"
                ) from error
    try:
        ray.init(address="local", **options)
    except (RuntimeError, OSError, ValueError) as error:
        raise OrchestratorError(
            f"Ray does not start on this machine ({error}). `--local` runs the job without it"
        ) from error
    return True
