"""A run's journal: one JSON object a line, appended and never changed. Knows nothing of MLflow."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Events that stand in the journal once, whatever died, and what tells them apart.
_IDENTITIES = {
    "step": ("step",),
    "evaluation": ("step",),
    "sample": ("when", "index"),
}


class Journal:
    """The writer of a journal; a run has one at a time."""

    def __init__(self, path: Path, redact: Callable[[str], str] = str) -> None:
        """Open or make the journal; a last line torn by a kill is cut off.

        Args:
            path: the file.
            redact: takes secrets out of every text that is written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._redact = redact
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        whole, self._seen = 0, set()
        for event, offset in read_events(path):
            whole = offset
            self._seen.add(_identity(event))
        if os.fstat(self._descriptor).st_size > whole:
            os.ftruncate(self._descriptor, whole)

    def append(self, event: str, **fields: Any) -> bool:
        """Add one event with the time; False where an event of its identity is there already."""
        record = {"event": event, "time": time.time(), **fields}
        identity = _identity(record)
        if identity is not None and identity in self._seen:
            return False
        line = json.dumps(_clean(record, self._redact), allow_nan=True) + "\n"
        # One write of a whole line: a kill leaves at most a torn last line.
        os.write(self._descriptor, line.encode())
        self._seen.add(identity)
        return True

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


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


def _identity(event: dict[str, Any]) -> tuple[Any, ...] | None:
    names = _IDENTITIES.get(event["event"])
    return None if names is None else (event["event"], *(event.get(name) for name in names))


def _clean(value: Any, redact: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: _clean(item, redact) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item, redact) for item in value]
    return value
