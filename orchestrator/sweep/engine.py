"""What runs on each worker of the Ray Train run whose tenants the trials are."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import ray

from orchestrator.cluster.worker import as_worker
from orchestrator.errors import (
    InterruptedRunError,
    OrchestratorError,
    RefusedError,
    WorkerLostError,
)
from orchestrator.places import write_whole
from orchestrator.training.membership import Wishes

# An engine without work looks that often whether it shall end.
_PAUSE_SECONDS = 0.5
_ANSWER_SECONDS = 60
# What a sweep's trials have in common: base and data.
_GROUND = ".ground.json"


def serve(config: dict[str, Any]) -> Any:
    """Train trials until the desk is closed. Errors the user can act on are returned."""
    return as_worker(config, _serve)


def _serve(config: dict[str, Any], device: Any, world: Any, observer: Any) -> dict[str, Any]:
    from orchestrator.places import cache_dir
    from orchestrator.plan.fit import train_apart
    from orchestrator.training import memory, proof
    from orchestrator.training.host import Host
    from orchestrator.training.run import open_ground, tell_shortened

    # A group that may begin with one worker, which has the memory for all trials, may have more.
    apart = config["apart"] or train_apart(config["trials"], world.size)
    engine, engines = (world.rank, world.size) if apart else (0, 1)
    places = ceil(config["trials"] / engines)
    ground = open_ground(
        config["job"], cache_dir(), device, world, observer, config["shared"], places, engines
    )
    with world.together():
        if config["job"].sweep is not None:
            _check_ground(ground.identity, config["job"].run_dir, world.leads)
    if apart:
        world.part()
    entry, dtype = ground.entry, ground.engine.base.dtype
    membership = DeskMembership(config["desk"], engine, engines, places)
    host = Host(ground, membership, observer, places)
    if apart and not world.leads:
        # The journals of its trials are all that anybody reads of it.
        ground.engine.shortened = partial(tell_shortened, host.emit)
    with membership.all_hear():
        best = host.run()
    results = {"workers": world.size, "peak_memory_bytes": memory.peak_bytes(device)}
    if best is None or not world.leads:
        return results
    # On a GPU that holds one base, the trained one must go before a fresh one is loaded.
    del ground
    adapter, trust = best / "adapter", config["job"].model.trust_remote_code
    claim = proof.Claim.load(adapter)

    def say(message: str) -> None:
        observer.emit("warning", message=message)

    proven = proof.prove_adapter(adapter, entry, device, dtype, claim, say, trust)
    return {**results, "proof": proven}


def _check_ground(identity: dict[str, str], run_dir: Path, leads: bool) -> None:
    """Trials of one sweep are trained on one base and one set of rows, whatever command goes on.

    Raises:
        RefusedError: the files have changed since it began.
    """
    kept = run_dir / _GROUND
    if not kept.exists():
        if leads:
            write_whole(kept, json.dumps(identity))
    elif (before := json.loads(kept.read_text())) != identity:
        changed = " and ".join(name for name in identity if identity[name] != before.get(name))
        raise RefusedError(
            f"{run_dir} holds a sweep over another {changed}: the files, the compute dtype or a "
            "library's version changed. Restore them, give the job another name, or delete that "
            "folder"
        )


class DeskMembership:
    """The host's membership, as the desk has it."""

    def __init__(self, desk: Any, engine: int, engines: int, places: int) -> None:
        """Of one of several engines, each with so many places."""
        self._desk = desk
        self._engine, self._engines, self._places = engine, engines, places
        self._version = 0

    def wishes(self, holds: Collection[str]) -> Wishes:
        """What is wanted now."""
        asked = (self._engine, self._engines, self._places, tuple(holds))
        found: Wishes = _answer(self._desk.wishes.remote(*asked))
        self._version = found.version
        if found.error is not None:
            raise found.error
        return found

    @contextmanager
    def all_hear(self) -> Iterator[None]:
        """Let an error of one engine end them all, for the command hears the first one's."""
        try:
            yield
        except InterruptedRunError:
            # Each of them hears of it by itself, and saves what it has.
            raise
        except OrchestratorError as error:
            if self._engines > 1:
                try:
                    _answer(self._desk.broken.remote(error))
                except (OrchestratorError, ray.exceptions.RayError) as silence:
                    # Ray starts all of them again; where the desk hears of it after all, they end.
                    raise WorkerLostError(str(error)) from silence
            raise

    def report(self, name: str, results: list[dict[str, Any]]) -> None:
        """All that a member's evaluations said so far."""
        _answer(self._desk.report.remote(name, results))

    def failed(self, name: str, error: str) -> None:
        """A member cannot go on; the others do."""
        _answer(self._desk.failed.remote(name, error))

    def observe(self, folder: Path) -> Any:
        """The trial's own journal, and what Ray shows of it."""
        from orchestrator.cluster.observer import Shown

        # <sweep>/trials/<trial>
        return Shown(folder, f"{folder.parent.parent.name}/{folder.name}")

    def pause(self) -> None:
        """Until something else is wanted, or a moment."""
        _answer(self._desk.changed.remote(self._version, _PAUSE_SECONDS))


def _answer(call: Any) -> Any:
    try:
        return ray.get(call, timeout=_ANSWER_SECONDS)
    except ray.exceptions.GetTimeoutError as error:
        raise OrchestratorError(
            f"The trials' desk did not answer within {_ANSWER_SECONDS} s; run the same command "
            "again to go on"
        ) from error
