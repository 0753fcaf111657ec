"""Where a base model comes from: a hub id, a folder or a .gguf file; and what identifies it."""

import hashlib
import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from orchestrator.config import ModelConfig
from orchestrator.errors import ModelError, first_line

_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine's disk.

    folder: what `from_pretrained` reads. gguf_file: the file in it, for GGUF. identity: changes
    whenever the weights do. code: whether the folder's own Python code may run.
    """

    name: str
    folder: Path
    gguf_file: str | None
    identity: str
    trust_remote_code: bool

    @property
    def path(self) -> Path:
        """The folder, or the .gguf file."""
        return self.folder if self.gguf_file is None else self.folder / self.gguf_file


def locate(config: ModelConfig, cache_dir: Path) -> ModelSource:
    """Find the model, downloading it where `base` is a hub id.

    Raises:
        ModelError: no such model, no access, or weights that lie in pickles only.
    """
    path = Path(config.base).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        digest = _content_digest([path], cache_dir)
        return ModelSource(config.base, path.parent, path.name, f"gguf:{digest}", False)
    if path.is_dir():
        code = sorted(path.glob("*.py")) if config.trust_remote_code else []
        digest = _content_digest([*_model_files(path, config.base), *code], cache_dir)
        return ModelSource(config.base, path, None, f"folder:{digest}", config.trust_remote_code)
    if path.suffix == ".gguf" or config.base.startswith((".", "/", "~")) or path.exists():
        raise ModelError(f"model.base: {config.base} does not exist{_nearest(path)}")
    folder = _download(config)
    _model_files(folder, config.base)
    return ModelSource(
        config.base, folder, None, f"hub:{config.base}@{folder.name}", config.trust_remote_code
    )


def longest_row(path: Path, config: ModelConfig) -> int | None:
    """Tokens that a model takes at most, by the config in a folder.

    None where it names no such number, or cannot be read: whoever loads the model says why. A .gguf
    file has no config, and to make one of it takes seconds.
    """
    from transformers import AutoConfig

    if path.is_file():
        return None
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError):
        return None
    limit = getattr(found.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _model_files(folder: Path, name: str) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.base: {name} holds no config.json, so it is no model")
    if not weights:
        pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
        found = f"; {', '.join(pickles[:3])} would run code when loaded" if pickles else ""
        raise ModelError(
            f"model.base: {name} holds no .safetensors weights{found}. "
            "Convert it with save_pretrained, or take a repository that has safetensors"
        )
    small = {path for pattern in _SMALL_FILES for path in folder.glob(pattern)}
    return [*weights, *sorted(small)]


def _download(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", *_SMALL_FILES]
    if config.trust_remote_code:
        patterns.append("*.py")
    try:
        return Path(
            snapshot_download(config.base, revision=config.revision, allow_patterns=patterns)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = first_line(error)
        raise ModelError(
            f"model.base: {config.base} is no folder here and could not be fetched from the hub "
            f"({type(error).__name__}: {first}). Check the name, HF_TOKEN and the network, or "
            "give a local folder or .gguf file"
        ) from error


def _nearest(path: Path) -> str:
    siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
    close = get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _content_digest(files: list[Path], cache_dir: Path) -> str:
    """SHA-256 over the files' names and contents; a file unchanged on disk is hashed once only."""
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode())
        total.update(_file_digest(file, cache_dir).encode())
    return total.hexdigest()


def _file_digest(file: Path, cache_dir: Path) -> str:
    stat = file.stat()
    key = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
    memo = cache_dir / "digests" / hashlib.sha256(key.encode()).hexdigest()
    if memo.is_file():
        kept = memo.read_text()
        if len(kept) == 64:
            return kept
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    memo.parent.mkdir(parents=True, exist_ok=True)
    beside = memo.with_suffix(f".{id(stream)}")
    beside.write_text(digest)
    beside.replace(memo)
    return digest


def settings_key(settings: dict[str, object]) -> str:
    """A short content address of settings: 32 hexadecimal digits."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
