"""A run's journal: one JSON object a line, appended and never changed. Knows nothing of MLflow."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.tracking.secrets import redact as hide_secrets

# Events that stand in the journal once, whatever died, and what tells them apart.
_IDENTITIES = {
    "step": ("step",),
    "evaluation": ("step",),
    "sample": ("when", "step", "index"),
}
# Words of ours; a password that happens to be one of them must not spoil them.
_OWN_WORDS = frozenset({"event", "when", "status"})


def journal_path(run_dir: Path) -> Path:
    """The journal of the run in this folder."""
    return run_dir / "journal.jsonl"


class Journal:
    """The writer of a journal; a run has one at a time. Threads may share it. A context manager."""

    def __init__(self, path: Path, redact: Callable[[str], str] = hide_secrets) -> None:
        """Open or make the journal; a last line torn by a kill is cut off.

        Args:
            path: the file.
            redact: takes secrets out of every text that is written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.last_step = 0
        """The highest step that stands in the journal; 0 before the first."""
        self.starts = 0
        """How often the run was started."""
        self._redact = redact
        self._lock = threading.Lock()
        self._seen: set[tuple[Any, ...]] = set()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        whole = 0
        for event, offset in read_events(path):
            self._remember(event)
            whole = offset
        if os.fstat(self._descriptor).st_size > whole:
            os.ftruncate(self._descriptor, whole)

    def append(self, event: str, **fields: Any) -> bool:
        """Add one event with the time; False where an event of its identity is there already.

        Raises:
            OSError: the disk does not take the line; nothing of it is left in the journal.
        """
        record = {"event": event, "time": time.time(), **fields}
        line = (json.dumps(_clean(record, self._redact)) + "\n").encode()
        with self._lock:
            identity = _identity(record)
            if identity is not None and identity in self._seen:
                return False
            self._write(line)
            self._remember(record)
        return True

    def sync(self) -> None:
        """Return when the storage has all lines; those that follow may wait in memory."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        # One write of a whole line: a kill leaves at most a torn last line.
        before = os.fstat(self._descriptor).st_size
        written = os.write(self._descriptor, line)
        if written != len(line):
            os.ftruncate(self._descriptor, before)
            raise OSError(f"The journal took {written} of {len(line)} bytes: is the disk full?")

    def _remember(self, event: dict[str, Any]) -> None:
        identity = _identity(event)
        if identity is not None:
            self._seen.add(identity)
        if event["event"] == "start":
            self.starts += 1
        if event["event"] == "step":
            self.last_step = max(self.last_step, event["step"])


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole events from a byte offset on, each with the offset after it."""
    with path.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                event = json.loads(line)
            except ValueError:
                # A line that a failing disk has spoilt is passed over.
                continue
            if isinstance(event, dict) and "event" in event:
                yield event, offset


def last_step(run_dir: Path) -> int:
    """The highest step in the journal of the run in this folder; 0 where there is none."""
    path = journal_path(run_dir)
    events = [event for event, _ in read_events(path)] if path.exists() else []
    return max((event["step"] for event in events if event["event"] == "step"), default=0)


def _identity(event: dict[str, Any]) -> tuple[Any, ...] | None:
    names = _IDENTITIES.get(event["event"])
    return None if names is None else (event["event"], *(event.get(name) for name in names))


def _clean(value: Any, redact: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {k: v if k in _OWN_WORDS else _clean(v, redact) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item, redact) for item in value]
    return value
