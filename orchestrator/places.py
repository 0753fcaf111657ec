"""Where things lie on a machine's disk."""

import hashlib
import os
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from platformdirs import user_cache_path

CACHE_VARIABLE = "ORCHESTRATOR_CACHE"


def cache_dir() -> Path:
    """Folder of quantized bases and tokenized data: $ORCHESTRATOR_CACHE or the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("orchestrator")


def is_uri(output_dir: str) -> bool:
    """Whether output_dir is a URI of an object store, not a folder."""
    return "://" in output_dir


def mirror_dir(uri: str) -> Path:
    """This machine's copy of what lies under a URI, whoever's credentials the URI holds."""
    parts = urlsplit(uri)
    server = parse_qs(parts.query).get("endpoint_override", [""])[0]
    place = "\n".join(
        [parts.scheme, parts.netloc.rpartition("@")[2], parts.path.strip("/"), server]
    )
    return cache_dir() / "runs" / hashlib.sha256(place.encode()).hexdigest()[:16]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it: who reads there finds all of it or the old one.

    Raises:
        OSError: the disk does not take it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    beside.replace(path)
