"""Where things lie on a machine's disk."""

import os
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "ORCHESTRATOR_CACHE"


def cache_dir() -> Path:
    """Folder of quantized bases and tokenized data: $ORCHESTRATOR_CACHE or the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("orchestrator")


def journal_path(run_dir: Path) -> Path:
    """The run's journal."""
    return run_dir / "journal.jsonl"


def stop_path(run_dir: Path) -> Path:
    """While this file is there, the run saves a checkpoint and ends after the present step."""
    return run_dir / ".stop"
