"""The loop's observer: events go to the journal, the wish to stop comes from a file."""

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception_type
from tenacity.stop import stop_after_delay
from tenacity.wait import wait_fixed

from orchestrator.tracking.journal import Journal, journal_path

# How long `close` waits for storage that refuses the journal's last lines.
_CLOSE_SECONDS = 60.0


def stop_path(run_dir: Path) -> Path:
    """While this file is there, the run saves a checkpoint and ends after the present step."""
    return run_dir / ".stop"


class JournalObserver:
    """Writes a run's journal; one process of a run holds it. A context manager.

    Events that the storage refuses are kept, and written when it takes them again.
    """

    def __init__(self, run_dir: Path) -> None:
        self._journal = Journal(journal_path(run_dir))
        self._stop = stop_path(run_dir)
        self._kept: list[tuple[str, dict[str, Any]]] = []
        # The sampler of the system's figures emits from a thread of its own.
        self._lock = threading.Lock()

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event."""
        with self._lock, suppress(OSError):
            # Storage that is full or away for a while must not end a training run.
            self._kept.append((event, {"time": time.time(), **fields}))
            self._write()

    def sync(self) -> None:
        """Bring all events to the disk itself, where a checkpoint of them will lie."""
        with self._lock, suppress(OSError):
            self._journal.sync()

    @property
    def starts(self) -> int:
        """How often the run was started so far."""
        return self._journal.starts

    def stop_requested(self) -> bool:
        """Whether someone asked the run to end."""
        return self._stop.exists()

    def save_requested(self) -> bool:
        """Never: who takes processes away tells so in another way."""
        return False

    def close(self) -> None:
        """Write what is left.

        Raises:
            OSError: the storage still refuses it.
        """
        for attempt in Retrying(
            retry=retry_if_exception_type(OSError),
            stop=stop_after_delay(_CLOSE_SECONDS),
            wait=wait_fixed(1),
            reraise=True,
        ):
            with attempt, self._lock:
                self._write()
        self._journal.close()

    def _write(self) -> None:
        while self._kept:
            event, fields = self._kept[0]
            self._journal.append(event, **fields)
            del self._kept[0]

    def __enter__(self) -> "JournalObserver":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StopOnly:
    """For the workers that do not lead: they say nothing, but stop with the others."""

    def __init__(self, run_dir: Path) -> None:
        self._stop = stop_path(run_dir)

    def emit(self, event: str, **fields: Any) -> None:
        """Nothing: the leading worker tells."""

    def sync(self) -> None:
        """Nothing."""

    def stop_requested(self) -> bool:
        """Whether someone asked the run to end."""
        return self._stop.exists()

    def save_requested(self) -> bool:
        """Never, as in `JournalObserver`."""
        return False
