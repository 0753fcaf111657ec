"""A run's folder on one machine, kept alike with the run's place in an object store.

What one process writes in its folder is pushed in an order that a kill anywhere does not spoil:
the journal before the checkpoints that belong to it, the adapter before the journal's word of it,
each checkpoint's `state.json` last, `result.json` after everything.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from orchestrator.tracking.journal import journal_path
from orchestrator.tracking.observer import stop_path

if TYPE_CHECKING:
    from orchestrator.storage.store import Store

KEY = ".run_key"
_RECORDS = (KEY, "job.yaml", ".delivery.json", "samples.jsonl", "result.json")
_CHECKPOINTS = "checkpoints"
_STATE = "state.json"
_ADAPTER = "adapter"
_ADAPTER_CONFIG = "adapter_config.json"
# How the journal's writer begins this event's line.
_ADAPTER_LINE = b'{"event": "adapter"'
# Other workers of this machine download the same files for as long.
_LOCK_SECONDS = 3600


class Mirror:
    """One folder and its place in a store. Every method raises OSError while the store is away."""

    def __init__(self, store: "Store", folder: Path, checkpoints: bool) -> None:
        """Of one process.

        Args:
            store: of this run alone.
            folder: the local folder; no other machine sees it.
            checkpoints: whether this folder needs the checkpoints, too.
        """
        self.store, self.folder = store, folder
        self._with_checkpoints = checkpoints
        self._journal = journal_path(folder)
        self._pushed: dict[str, bytes | None] = {}
        # Bytes of it that the store has, and those of the last attempt to push it.
        self._journal_size = self._attempted = 0
        # The `state.json` of each checkpoint in the store; None where its upload was cut off.
        self._states: dict[str, bytes | None] = {}

    def pull(self) -> None:
        """Make the folder what the store has, unless it is further on with the same run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".mirror.lock", timeout=_LOCK_SECONDS):
            key = self.store.read(KEY)
            if key is None or key != _content(self.folder / KEY):
                # Another run, or one that was deleted in the store.
                self._clear()
            remote = self.store.read(self._journal.name) or b""
            further = (_content(self._journal) or b"").startswith(remote)
            if not further:
                self._take_journal(remote)
            self._journal_size = len(remote)
            self._pull_records(further)
            self._states = {
                name: self.store.read(f"{_CHECKPOINTS}/{name}/{_STATE}")
                for name in self.store.folders(_CHECKPOINTS)
            }
            if self._with_checkpoints:
                self._pull_checkpoints(further)

    def begun(self) -> bool:
        """Whether a checkpoint of the run is in the store."""
        return any(state is not None for state in self._states.values())

    def push(self, prune: bool) -> None:
        """Push what the folder has and the store lacks; only the writer of the journal may.

        Args:
            prune: delete checkpoints in the store that are not in the folder.
        """
        # Before the journal is read: what is in a checkpoint is in the journal by then.
        saved = sorted((self.folder / _CHECKPOINTS).glob("step-*"), reverse=True)
        self._push_journal()
        if not self._with_checkpoints:
            return
        for path in saved:
            self._push_checkpoint(path)
        # A folder that someone emptied does not empty the store.
        if prune and saved:
            for name in set(self._states) - {path.name for path in saved}:
                self.store.delete_folder(f"{_CHECKPOINTS}/{name}", first=_STATE)
                del self._states[name]

    def push_records(self) -> None:
        """Push the small files of the command that runs the job, where they changed."""
        for name in _RECORDS:
            content = _content(self.folder / name)
            if content is not None and content != self._pushed.get(name):
                self.store.write(name, content)
                self._pushed[name] = content

    def follow(self) -> None:
        """Append to the journal what its writer on another machine has pushed since."""
        known = self._journal.stat().st_size if self._journal.exists() else 0
        if (self.store.size(self._journal.name) or 0) <= known:
            return
        fresh = _whole_lines(self.store.read(self._journal.name, known) or b"")
        self._fetch_adapter(fresh)
        with self._journal.open("ab") as journal:
            journal.write(fresh)
        self._journal_size = known + len(fresh)

    def has_adapter(self) -> bool:
        """Whether the adapter is in the store."""
        return self.store.size(f"{_ADAPTER}/{_ADAPTER_CONFIG}") is not None

    def _take_journal(self, content: bytes) -> None:
        self._fetch_adapter(content)
        _write(self._journal, content)

    def _fetch_adapter(self, lines: bytes) -> None:
        """Who reads of it in the journal finds it in the folder."""
        if _tells_of_adapter(lines):
            self.store.download(_ADAPTER, self.folder / _ADAPTER, last=_ADAPTER_CONFIG)

    def _pull_records(self, further: bool) -> None:
        for name in _RECORDS:
            path, content = self.folder / name, self.store.read(name)
            self._pushed[name] = content
            if further and path.exists():
                continue
            if content is None:
                path.unlink(missing_ok=True)
            else:
                _write(path, content)

    def _pull_checkpoints(self, further: bool) -> None:
        folder = self.folder / _CHECKPOINTS
        for path in folder.glob("step-*"):
            if not further and self._states.get(path.name) is None:
                shutil.rmtree(path)
        for name, state in self._states.items():
            own = _content(folder / name / _STATE)
            if state is not None and own != state and not (further and own is not None):
                self.store.download(f"{_CHECKPOINTS}/{name}", folder / name, last=_STATE)

    def _push_journal(self) -> None:
        if not self._journal.exists() or self._journal.stat().st_size == self._journal_size:
            return
        content = _whole_lines(_content(self._journal) or b"")
        if len(content) == self._journal_size:
            return
        self._check_sole_writer()
        if _tells_of_adapter(content[self._journal_size :]):
            self.store.upload(self.folder / _ADAPTER, _ADAPTER, last=_ADAPTER_CONFIG)
        self._attempted = len(content)
        self.store.write(self._journal.name, content)
        self._journal_size = len(content)

    def _check_sole_writer(self) -> None:
        """A process that was taken for dead must not write over the journal of its successor."""
        size = self.store.size(self._journal.name) or 0
        # The store may have taken an attempt whose answer was lost.
        if size not in (self._journal_size, self._attempted):
            raise OSError("another process has written this run's journal meanwhile")

    def _push_checkpoint(self, path: Path) -> None:
        state = _content(path / _STATE)
        if state is None or state == self._states.get(path.name):
            return
        name = f"{_CHECKPOINTS}/{path.name}"
        if self._states.get(path.name) is not None:
            self.store.delete(f"{name}/{_STATE}")
        self._states[path.name] = None
        try:
            self.store.upload(path, name, last=_STATE)
        except FileNotFoundError:
            # Newer ones have taken its place in the folder.
            return
        self._states[path.name] = state

    def _clear(self) -> None:
        for name in (*_RECORDS, self._journal.name):
            (self.folder / name).unlink(missing_ok=True)
        for name in (_CHECKPOINTS, _ADAPTER):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        stop_path(self.folder).unlink(missing_ok=True)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _write(path: Path, content: bytes) -> None:
    """Write beside and rename."""
    beside = path.with_name(f".{path.name}.fetched")
    beside.write_bytes(content)
    beside.replace(path)


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _tells_of_adapter(lines: bytes) -> bool:
    return any(line.startswith(_ADAPTER_LINE) for line in lines.splitlines())
