"""Where Ray Tune keeps its state: a local filesystem that shows no file before it is whole.

Tune copies its state over the old one every second. Whoever kills it in between would leave half a
file, and the sweep could not go on.
"""

import io
import json
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from orchestrator.errors import OrchestratorError
from orchestrator.places import write_whole

_STATES = "experiment_state-*.json"


class _WholeFile(io.BytesIO):
    """Written beside its place and renamed when it is closed; Tune's files are small."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def __del__(self) -> None:
        # Who gives up halfway closes nothing; the base class would, and so commit half a file.
        super().close()

    def close(self) -> None:
        if not self.closed:
            try:
                write_whole(self._path, self.getvalue())
            finally:
                super().close()


class _WholeFiles(LocalFileSystem):  # type: ignore[misc]
    def _open(self, path: str, mode: str = "rb", *args: Any, **settings: Any) -> Any:
        if mode == "wb":
            return _WholeFile(Path(path))
        return super()._open(path, mode, *args, **settings)


def whole_files() -> FileSystem:
    """The filesystem, as Tune takes it."""
    return PyFileSystem(FSSpecHandler(_WholeFiles()))


def has_state(folder: Path) -> bool:
    """Whether there is a search to go on with; a kill may have come before its first word."""
    return any(folder.glob(_STATES))


def _newest(folder: Path) -> Path | None:
    """The state that Tune takes: each is named by the time of the command that wrote it."""
    return max(folder.glob(_STATES), default=None)


def known_trials(folder: Path) -> dict[str, bool]:
    """Each trial in the state that a killed sweep would go on from, and whether it has ended."""
    newest = _newest(folder)
    kept = [] if newest is None else json.loads(newest.read_text())["trial_data"]
    trials = [json.loads(trial) for trial, _ in kept]
    return {trial["trial_id"]: trial["status"] == "TERMINATED" for trial in trials}


def check_readable(folder: Path) -> None:
    """The state that a killed sweep would go on from is whole.

    Raises:
        OrchestratorError: a disk has lost some of it.
    """
    newest = _newest(folder)
    if newest is None:
        return
    try:
        json.loads(newest.read_text())
    except ValueError as error:
        raise OrchestratorError(
            f"{newest} is damaged ({error}), so the search cannot go on. Delete {folder} and run "
            "the same command again: it searches anew, and trials that have finished still count"
        ) from error
