"""The loop's observer: events go to the journal, the wish to stop comes from a file."""

from pathlib import Path
from typing import Any

from orchestrator.tracking.journal import Journal, journal_path


def stop_path(run_dir: Path) -> Path:
    """While this file is there, the run saves a checkpoint and ends after the present step."""
    return run_dir / ".stop"


class JournalObserver:
    """Writes a run's journal; one process of a run holds it. A context manager."""

    def __init__(self, run_dir: Path) -> None:
        self._journal = Journal(journal_path(run_dir))
        self._stop = stop_path(run_dir)

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event."""
        self._journal.append(event, **fields)

    def stop_requested(self) -> bool:
        """Whether someone asked the run to end."""
        return self._stop.exists()

    def __enter__(self) -> "JournalObserver":
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()


class StopOnly:
    """For the workers that do not lead: they say nothing, but stop with the others."""

    def __init__(self, run_dir: Path) -> None:
        self._stop = stop_path(run_dir)

    def emit(self, event: str, **fields: Any) -> None:
        """Nothing: the leading worker tells."""

    def stop_requested(self) -> bool:
        """Whether someone asked the run to end."""
        return self._stop.exists()
