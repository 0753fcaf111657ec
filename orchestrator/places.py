"""Where things lie on a machine's disk."""

import os
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "ORCHESTRATOR_CACHE"


def cache_dir() -> Path:
    """Folder of quantized bases and tokenized data: $ORCHESTRATOR_CACHE or the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("orchestrator")
