"""How far a run's journal has been delivered; kept beside it, written beside and renamed."""

import json
import os
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

_FILE = ".delivery.json"


@dataclass(frozen=True)
class Cursor:
    """The state of a delivery.

    run_key: our own name of the run, chosen before MLflow gives it an id. offset: bytes of the
    journal that are delivered.
    """

    run_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    run_id: str | None = None
    offset: int = 0
    model_version: str | None = None

    @classmethod
    def load(cls, run_dir: Path) -> "Cursor":
        """The run's cursor; a new one is saved at once, so that its key is never lost."""
        try:
            return cls(**json.loads((run_dir / _FILE).read_text()))
        except (OSError, ValueError, TypeError):
            cursor = cls()
            cursor.save(run_dir)
            return cursor

    def save(self, run_dir: Path) -> None:
        """Write it."""
        beside = run_dir / f"{_FILE}.{os.getpid()}"
        beside.write_text(json.dumps(asdict(self)))
        beside.replace(run_dir / _FILE)

    def moved(self, offset: int) -> "Cursor":
        """With the journal delivered up to `offset`."""
        return replace(self, offset=offset)
