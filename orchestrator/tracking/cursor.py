"""How far a run's journal has been delivered; kept beside it, written beside and renamed."""

import json
import os
import uuid
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from orchestrator.errors import OrchestratorError

_FILE = ".delivery.json"
_KEY_FILE = ".run_key"


@dataclass(frozen=True)
class Cursor:
    """The state of a delivery."""

    run_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Our own name of the run, chosen before MLflow gives it an id."""
    store: str | None = None
    """The MLflow store the rest speaks of, without its password."""
    run_id: str | None = None
    offset: int = 0
    """Bytes of the journal that are delivered."""
    uploaded: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the folders that lie in MLflow."""
    model_version: str | None = None

    @classmethod
    def peek(cls, run_dir: Path) -> "Cursor | None":
        """The run's cursor; None before its first delivery, or where it is damaged.

        Raises:
            OrchestratorError: the disk does not give it.
        """
        content = _read(run_dir / _FILE)
        known = {item.name for item in fields(cls)}
        try:
            kept = json.loads(content or "")
            return cls(**{name: value for name, value in kept.items() if name in known})
        except (ValueError, AttributeError):
            return None

    @classmethod
    def load(cls, run_dir: Path) -> "Cursor":
        """The run's cursor. A new one, or one in place of a damaged one, is saved at once."""
        found = cls.peek(run_dir)
        # The key is never written again: without it a damaged cursor would cost a second run.
        key = _read(run_dir / _KEY_FILE)
        if found is None:
            found = cls(run_key=key) if key else cls()
            found.save(run_dir)
        if not key:
            _write(run_dir / _KEY_FILE, found.run_key)
        return found

    def save(self, run_dir: Path) -> None:
        """Write it."""
        _write(run_dir / _FILE, json.dumps(asdict(self)))

    def moved(self, offset: int) -> "Cursor":
        """With the journal delivered up to `offset`."""
        return replace(self, offset=offset)

    def over(self, store: str, journal_size: int) -> "Cursor":
        """For delivery to this store; from the start if it speaks of another store or journal."""
        if self.store not in (None, store) or self.offset > journal_size:
            return self.afresh(store)
        return replace(self, store=store)

    def afresh(self, store: str) -> "Cursor":
        """Nothing delivered yet. The key stays, so that a run that is there is found again."""
        return Cursor(run_key=self.run_key, store=store)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OrchestratorError(
            f"{path} cannot be read, so nothing is delivered: {error}"
        ) from error


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with beside.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
