"""Joining a Ray cluster, or starting Ray on this machine."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from orchestrator.cluster.plan import MOST_VARIABLE, Resources, reach, told_nodes, total
from orchestrator.errors import OrchestratorError, RefusedError, first_line
from orchestrator.imports import import_beside

_JOIN = (
    "Start one with `ray start --head`, or take auto or local. Where one runs, give the "
    "command its token: in RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in "
    "~/.ray/auth_token"
)
# What processes of a Ray that is started here inherit, where the user has no word of her own.
_INHERITED = {
    # Ray runs workers at the lowest priority but four, for machines that serve others beside it.
    # Where workers compute on the CPU, its other processes then interrupt every step: a quarter of
    # its speed.
    "RAY_worker_niceness": "0",
    # Each of Ray's processes wakes a hundred times a second, so there are as few as may be: no idle
    # worker is kept nor started in advance (each of Ray Train's has an environment of its own, so
    # that none would be used), and none watches for a node that is taken away.
    "RAY_num_workers_soft_limit": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # What its agent measures of the machine every five seconds is for a dashboard.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}


@dataclass(frozen=True)
class Session:
    """A Ray session. `own` is True where this process started Ray for itself.

    nodes: what each node has. most: the nodes to which the cluster's autoscaler may bring it; None
    where there is no autoscaler.
    """

    own: bool
    nodes: tuple[Resources, ...]
    most: tuple[Resources, ...] | None

    @property
    def here(self) -> Resources:
        """What the cluster has now."""
        return total(self.nodes)

    @property
    def reach(self) -> Resources:
        """What it has once its autoscaler has added all it may."""
        return reach(self.nodes, self.most)

    @property
    def several_nodes(self) -> bool:
        """Whether workers find room on more than one node, now or once an autoscaler adds some."""
        return self.most is not None or sum(bool(node.named) for node in self.nodes) > 1


@contextmanager
def session(
    address: str, say: Callable[[str], None], libraries: Sequence[str] = ()
) -> Iterator[Session]:
    """Connect to `address`; `auto` joins this machine's cluster or starts Ray here.

    Args:
        address: as in the job file.
        say: is told what the user should know.
        libraries: what is needed next and does not import Ray; imported while Ray starts.

    Raises:
        RefusedError: an address was given and no cluster answers there, or it wants a token.
        OrchestratorError: Ray does not start.
    """
    with ExitStack() as environment:
        with _own_sigterm():
            importing = import_beside(libraries)
            try:
                own = _connect(address, say, environment)
            finally:
                # Two threads in one library's imports can trip over each other.
                importing.join()
        try:
            nodes = (node["Resources"] for node in ray.nodes() if node["Alive"])
            yield Session(own, tuple(map(_resources, nodes)), _most())
        finally:
            ray.shutdown()


def check_kept(run_dir: Path) -> None:
    """A submitted job must not leave its results in the folder that was sent with it.

    Raises:
        RefusedError: it would; Ray deletes that folder when the job has ended.
    """
    submitted = ray.get_runtime_context().runtime_env.working_dir()
    if submitted and run_dir.is_relative_to(Path.cwd()):
        raise RefusedError(
            f"output_dir: {run_dir} lies in the working directory that came with the submitted "
            "job, which Ray deletes after it. Give a path that all nodes share, such as "
            "`--set output_dir=/mnt/shared/runs`"
        )


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the process's handler of SIGTERM, which asks a run for a checkpoint.

    Ray puts one in its place that ends the process at once; `ray job stop` sends SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _inherited() -> Iterator[None]:
    """Set what processes of an own Ray inherit; a later session may be of another's."""
    missing = {name: value for name, value in _INHERITED.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _connect(address: str, say: Callable[[str], None], environment: ExitStack) -> bool:
    if address.startswith("ray://"):
        raise RefusedError(
            f"cluster.address: {address} is for Ray's client, through which nothing is trained. "
            "Submit the job with `ray job submit`, or run the command on a node with "
            "`cluster.address: auto`"
        )
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    named = address != "auto" or bool(os.environ.get("RAY_ADDRESS"))
    if address != "local" and (named or _started_here()):
        token = _use_token()
        try:
            ray.init(address=address, **options)
        except (
            OSError,
            RuntimeError,
            ValueError,
            ray.exceptions.AuthenticationError,
        ) as error:
            # A wrong token looks to Ray's client like a cluster that is not there.
            if named or not isinstance(error, ConnectionError):
                raise RefusedError(
                    f"cluster.address: no Ray cluster at {address} lets this command in "
                    f"({first_line(error)}). {_JOIN}"
                ) from error
        else:
            if not token:
                say(
                    "This Ray cluster was joined without a token: whoever reaches its ports can "
                    "run code on it. `ray get-auth-token --generate` before `ray start` closes it"
                )
            return False
    environment.enter_context(_inherited())
    try:
        # Ray itself switches its token on for a cluster that it starts so. Its dashboard is for
        # clusters that outlive a command; its eleven processes would cost two seconds of the start.
        ray.init(address="local", include_dashboard=False, **options)
    except (RuntimeError, OSError, ValueError) as error:
        raise OrchestratorError(
            f"Ray does not start on this machine ({error}). `--local` runs the job without it"
        ) from error
    # It reads the workers' logs for commands that print them, ten times a second.
    ray._private.worker._global_node.kill_log_monitor(check_alive=False)
    return True


def _started_here() -> bool:
    """Whether `ray start` has made this machine part of a cluster.

    Ray itself would also join what another command has started for itself, and die with it.
    """
    from ray._private.services import find_bootstrap_address

    return find_bootstrap_address(None) is not None


def _use_token() -> bool:
    """Show a token where there is one; Ray's clients of a given address do not by themselves."""
    from ray._private.authentication import authentication_token_setup as setup

    logging.getLogger(setup.__name__).setLevel(logging.ERROR)
    return setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _most() -> tuple[Resources, ...] | None:
    """What the autoscaler's own configuration admits, or its head's environment says of it.

    Ray's own autoscaler does not tell its configuration (2.60).
    """
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config()
    if most is not None:
        # How large the nodes are it does not say.
        return (_resources(most),)
    told = os.environ.get(MOST_VARIABLE)
    return told_nodes(told) if told else None


def _resources(named: dict[str, Any]) -> Resources:
    return Resources(float(named.get("CPU", 0)), float(named.get("GPU", 0)))
