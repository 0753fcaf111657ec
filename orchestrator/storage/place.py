"""A run's place: a folder that all its machines share, or an object store with a mirror on each.

The command that runs a job and the workers that train it ask for the same things either way.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.places import is_uri
from orchestrator.storage.background import Say, patiently, reason, repeated
from orchestrator.storage.bases import BasesStore
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.uri import below
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.observer import stop_path

_PROOF = ".shared"
_OF_TRIALS = "trials/*/checkpoints"


class Place:
    """A folder that all machines share, where everything is as soon as it is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """The run's folder on this machine."""
        self.name = str(folder)
        """Where the user finds the run."""
        self.adapter = str(folder / "adapter")
        """Where the user finds the adapter."""

    def has_adapter(self) -> bool:
        """Whether the adapter is there."""
        return (self.folder / "adapter").is_dir()

    def begun(self) -> bool:
        """Whether training began."""
        return (self.folder / "checkpoints").exists() or any(self.folder.glob(_OF_TRIALS))

    def open(self) -> None:
        """For the command, at its start: see what is there."""

    def publish(self) -> None:
        """For the command, before any work: let the workers see the job."""

    @contextmanager
    def following(self, say: Say) -> Iterator[None]:
        """For the command, while workers write the journal."""
        yield

    @contextmanager
    def writing(self, say: Say) -> Iterator[None]:
        """For who writes the journal and the checkpoints, while it does."""
        yield

    @contextmanager
    def concluding(self, say: Say) -> Iterator[None]:
        """For the command, until the run's last word is written."""
        yield

    def take_over(self) -> None:
        """For the leading worker, before it reads anything."""

    def fetch(self) -> None:
        """For the other workers, after the leading one has taken over."""

    def bases(self) -> BasesStore | None:
        """Where machines find what one has quantized; None: in a folder beside the run's."""
        return None

    def leave(self, proof: str) -> None:
        """Leave a word that only who shares this place can see."""
        for left in self.folder.glob(_proof_file("*")):
            left.unlink(missing_ok=True)
        (self.folder / _proof_file(proof)).touch()

    def sees(self, proof: str) -> bool:
        """Whether that word is seen here."""
        return (self.folder / _proof_file(proof)).exists()

    def remove(self, proof: str) -> None:
        """Take it away."""
        (self.folder / _proof_file(proof)).unlink(missing_ok=True)


class StorePlace(Place):
    """A place in an object store, with a mirror of it in a local folder."""

    def __init__(self, job: JobConfig, folder: Path, trains: bool) -> None:
        """Of one process.

        Args:
            job: its output_dir is a URI.
            folder: of the mirror.
            trains: whether this process trains and needs the checkpoints.

        Raises:
            RefusedError: the URI cannot be asked.
        """
        super().__init__(folder)
        # Arrow is loaded for a URI only.
        from orchestrator.storage.store import open_store

        self.name, self.adapter = (
            below(job.output_dir, n) for n in (job.name, f"{job.name}/adapter")
        )
        self._store = open_store(job.output_dir, job.name)
        self._bases = BasesStore(open_store(job.output_dir, ".bases"))
        self._mirror = Mirror(self._store, folder, checkpoints=trains)
        self._stop = stop_path(folder)
        self._asked = False

    def has_adapter(self) -> bool:
        """Whether the adapter is there."""
        with self._or_else(RefusedError, "cannot be read"):
            return self._mirror.has_adapter()

    def begun(self) -> bool:
        """Whether a checkpoint is there, or waits in the mirror."""
        return self._mirror.begun() or super().begun()

    def open(self) -> None:
        """Pull what is there; a folder that is further on with this run is pushed.

        Raises:
            RefusedError: the store cannot be read or written.
        """
        with self._or_else(RefusedError, "cannot be read"):
            self._mirror.pull()
            self._store.delete(self._stop.name)

    def publish(self) -> None:
        """Push the job and the run's key, and what a command before could not push.

        Raises:
            RefusedError: the store cannot be written.
        """
        # Saves the key by which the run is known, if there is none yet.
        Cursor.load(self.folder)
        with self._or_else(RefusedError, "cannot be written"):
            self._mirror.push_records()
            self._mirror.push(prune=False)

    @contextmanager
    def following(self, say: Say) -> Iterator[None]:
        """Fetch the journal as it grows, and pass the wish to stop on.

        Raises:
            OrchestratorError: the store is away at the end.
        """
        with repeated(self._follow, self._follow_end, say):
            yield

    @contextmanager
    def writing(self, say: Say) -> Iterator[None]:
        """Push what is written, and see the wish to stop.

        Raises:
            OrchestratorError: the store does not take what was trained.
        """
        with repeated(self._write, self._write_end, say):
            yield

    @contextmanager
    def concluding(self, say: Say) -> Iterator[None]:
        """Push the journal's end and the results after the block.

        Raises:
            OrchestratorError: the store does not take them.
        """
        try:
            yield
        except Exception:
            try:
                self._conclude()
            except OSError as error:
                say(f"{self.name} lacks the end of the journal ({reason(error)})")
            raise
        with self._or_else(OrchestratorError, "does not take the run's end"):
            patiently(self._conclude)

    def take_over(self) -> None:
        """Pull journal and checkpoints; push what a killed worker could not push.

        Raises:
            OrchestratorError: the store is away.
        """
        with self._or_else(OrchestratorError, "is away"):
            patiently(self._mirror.pull)
            patiently(lambda: self._mirror.push(prune=False))
        self._stop.unlink(missing_ok=True)

    def fetch(self) -> None:
        """Pull journal and checkpoints.

        Raises:
            OrchestratorError: the store is away.
        """
        with self._or_else(OrchestratorError, "is away"):
            patiently(self._mirror.pull)

    def bases(self) -> BasesStore | None:
        """Quantized bases in the store."""
        return self._bases

    def leave(self, proof: str) -> None:
        """Leave a word that only who shares this place can see.

        Raises:
            RefusedError: the store cannot be written.
        """
        with self._or_else(RefusedError, "cannot be written"):
            self._store.write(_PROOF, proof.encode())

    def sees(self, proof: str) -> bool:
        """Whether that word is seen here.

        Raises:
            RefusedError: the store cannot be read from here.
        """
        found: list[bytes | None] = []
        with self._or_else(RefusedError, f"cannot be read on node {platform.node()}"):
            # Workers ask at each start, and a store that is away for a moment refuses nobody.
            patiently(lambda: found.append(self._store.read(_PROOF)))
        return found == [proof.encode()]

    def remove(self, proof: str) -> None:
        """Take it away; one that stays does no harm."""
        with suppress(OSError):
            self._store.delete(_PROOF)

    def _follow(self) -> None:
        self._mirror.push_records()
        if self._stop.exists() and not self._asked:
            self._store.write(self._stop.name, b"")
            self._asked = True
        self._mirror.follow()

    def _write(self) -> None:
        if self._store.size(self._stop.name) is not None:
            self._stop.touch()
        self._mirror.push(prune=True)

    def _follow_end(self) -> None:
        with self._or_else(OrchestratorError, "did not give the end of the journal"):
            patiently(self._follow)

    def _write_end(self) -> None:
        with self._or_else(OrchestratorError, "does not take what was trained"):
            patiently(self._write)

    def _conclude(self) -> None:
        self._mirror.push(prune=False)
        self._mirror.push_records()

    @contextmanager
    def _or_else(self, kind: type[OrchestratorError], what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise kind(
                f"output_dir: {self.name} {what} ({reason(error)}). This machine's copy is in "
                f"{self.folder}; run the same command again when the store answers"
            ) from error


def _proof_file(proof: str) -> str:
    return f"{_PROOF}-{proof}"


def command_place(job: JobConfig, run_dir: Path, trains: bool) -> Place:
    """The place of a run, for the command that runs it.

    Args:
        job: the resolved job.
        run_dir: the run's folder here.
        trains: whether the command trains in its own process.

    Raises:
        RefusedError: output_dir is a URI that cannot be asked.
    """
    return StorePlace(job, run_dir, trains) if is_uri(job.output_dir) else Place(run_dir)


def worker_place(job: JobConfig, run_dir: Path) -> Place:
    """The place of a run, for one of its workers.

    Args:
        job: the resolved job.
        run_dir: the run's folder as the command has it.

    Raises:
        RefusedError: output_dir is a URI that cannot be asked from here.
    """
    if is_uri(job.output_dir):
        # Not the command's own mirror: a mirror's journal has one writer.
        return StorePlace(job, job.local_dir / ".workers" / job.name, True)
    return Place(run_dir)
