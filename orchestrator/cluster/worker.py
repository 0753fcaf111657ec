"""What runs on each worker of a Ray Train run."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from orchestrator.cluster.priority import let_ray_wait
from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.imports import uncollected
from orchestrator.quiet import quiet_libraries
from orchestrator.storage.place import Place, worker_place

# A shared file system may show a file of another machine a little later.
_SHARED_SECONDS = 10.0


def train(config: dict[str, Any]) -> Any:
    """Fine-tune as one worker of the run. Errors the user can act on are returned."""
    return as_worker(config, _train)


def _train(config: dict[str, Any], device: Any, world: Any, observer: Any) -> dict[str, Any]:
    from orchestrator.places import cache_dir
    from orchestrator.training.run import run

    folder, shared = Path(config["run_dir"]), config["shared"]
    return run(config["job"], folder, cache_dir(), device, world, observer, shared)


def as_worker(config: dict[str, Any], work: Callable[..., dict[str, Any]]) -> Any:
    """Do `work(config, device, world, observer)` as one worker of a run.

    An error the user can act on is returned, not raised: Ray would start the workers again for it.
    """
    # Ray Train sets it to a GPU even where that is a simulated one.
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    with uncollected():
        quiet_libraries()
        import torch
        import transformers.modeling_utils  # noqa: F401

    torch.set_num_threads(config["threads"])
    if os.path.isdir(config["working_dir"]):
        # Relative paths in the job file mean the folder the command was given in.
        os.chdir(config["working_dir"])
    place: Place | None = None
    try:
        device = _device(config["gpus"])
        world = _world(device, config["collective_timeout"])
        if config["own"] and device.type == "cpu":
            # All workers have joined by now, so none of them is taken for another process of Ray's.
            let_ray_wait()
        with world.together():
            place = worker_place(config["job"], Path(config["run_dir"]))
        _check_and_fetch(place, config["proof"], world)
        found = {**config, "run_dir": str(place.folder), "shared": _shared(place, world, config)}
        with (
            _observer(place.folder, world.leads, config["job"].name) as observer,
            _written(place, world.leads, observer),
        ):
            return work(found, device, world, observer)
    except OrchestratorError as error:
        if isinstance(error, RefusedError) and place is not None and place.begun():
            # Refused is only what has not begun.
            return OrchestratorError(str(error))
        return error


def _check_and_fetch(place: Place, proof: str, world: Any) -> None:
    """See that the run lies there, with what was trained before on this machine's disk."""
    with world.together():
        _check_shared(place, proof)
    with world.together():
        if world.leads:
            place.take_over()
    with world.together():
        if not world.leads:
            place.fetch()


def _shared(place: Place, world: Any, config: dict[str, Any]) -> Any:
    """Where other machines of the cluster find what one has quantized; None where it has no others.

    The next run's workers may be on another machine than this one's.
    """
    from orchestrator.training.run import bases_beside

    if not config["several_nodes"] and world.nodes == 1:
        return None
    # Trials in engines of their own share those of their sweep.
    return place.bases() or bases_beside(Path(config.get("output_dir", place.folder.parent)))


@contextmanager
def _written(place: Place, leads: bool, observer: Any) -> Iterator[None]:
    """While the block runs, what the leader writes reaches the run's place."""

    def say(message: str) -> None:
        observer.emit("warning", message=message)

    with place.writing(say) if leads else nullcontext():
        try:
            yield
        except OrchestratorError as error:
            # What the user reads names the place, not this machine's copy of it.
            raise type(error)(str(error).replace(str(place.folder), place.name)) from error


def _device(gpus: float) -> Any:
    """The GPU that Ray gave this worker; the CPU where it gave none, or a simulated one."""
    import torch

    if not gpus or not torch.cuda.is_available():
        return torch.device("cpu")
    import ray.train.torch

    device = ray.train.torch.get_device()
    torch.cuda.set_device(device)
    return device


def _world(device: Any, timeout: float) -> Any:
    """This worker among the others of Ray Train's group."""
    import ray.train

    from orchestrator.training.collective import join

    context = ray.train.get_context()
    node = ray.get_runtime_context().get_node_id()
    return join(context.get_world_rank(), context.get_world_size(), device, node, timeout)


def _check_shared(place: Place, proof: str) -> None:
    """The run's place must be the driver's, on whatever machine this worker is.

    Raises:
        RefusedError: it is another folder of the same name, or a store this worker cannot read.
    """
    from tenacity import RetryError, Retrying, retry_if_result
    from tenacity.stop import stop_after_delay
    from tenacity.wait import wait_fixed

    retrying = Retrying(
        retry=retry_if_result(lambda there: not there),
        stop=stop_after_delay(_SHARED_SECONDS),
        wait=wait_fixed(0.5),
    )
    try:
        retrying(lambda: place.sees(proof))
    except RetryError:
        raise RefusedError(
            f"output_dir: {place.name} on node {os.uname().nodename} is not the folder that the "
            "command wrote to. With workers on several nodes it must be a path that all of them "
            "share, or a URI such as s3://bucket/runs"
        ) from None


def _observer(run_dir: Path, leads: bool, name: str) -> Any:
    from orchestrator.cluster.observer import Follower, Leader

    return Leader(run_dir, name) if leads else Follower(run_dir)
