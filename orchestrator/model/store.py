"""The base store: a model is quantized once, and every later load reads the 4-bit file.

An entry is a folder in the Hugging Face layout named by its content address. It is written
beside and renamed under a lock, so that several processes at once make it once.
"""

import errno
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Protocol

import torch
from filelock import FileLock

from orchestrator.config import QuantizationConfig
from orchestrator.errors import ModelError, OrchestratorError, first_line
from orchestrator.model.base import ENTRY, load_tokenizer
from orchestrator.model.dense import load_dense
from orchestrator.model.gguf_weights import dequantize_gguf, read_one_by_one
from orchestrator.model.source import ModelSource, settings_key
from orchestrator.model.support import check_architecture

_LOCK_SECONDS = 4 * 3600
_ATTEMPTS = 10
_DAY_SECONDS = 86400.0
# What a rename says where a folder with files is: Linux the first, some network disks the second.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
_CPU = torch.device("cpu")


def entry_key(source: ModelSource, quantization: QuantizationConfig, dtype: torch.dtype) -> str:
    """The content address of a base: weights, quantization settings, library versions."""
    return settings_key(
        {
            "identity": source.identity,
            "type": quantization.type,
            "double_quant": quantization.double_quant,
            "dtype": str(dtype),
            "transformers": version("transformers"),
            "bitsandbytes": version("bitsandbytes"),
        }
    )


def ensure(
    source: ModelSource,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    store: Path,
    say: Callable[[str], None],
    shared: "SharedBases | None" = None,
    device: torch.device = _CPU,
) -> Path:
    """The store's folder of this base, quantized now if no process has done so before.

    Args:
        source: the model.
        quantization: how it is quantized.
        dtype: the compute dtype.
        store: this machine's store.
        say: is told what takes long.
        shared: a store that other machines reach too; what is made here is put there, and what
            another machine has put there is fetched.
        device: where it is quantized; bitsandbytes does it many times faster on a GPU.

    Raises:
        ModelError: the model cannot be read, or its architecture is not supported.
    """
    entry = store / entry_key(source, quantization, dtype)
    if not _complete(entry):
        store.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock", timeout=_LOCK_SECONDS):
            if not _complete(entry):
                _remove_left(entry)
                if shared is not None:
                    shared.fetch(entry)
                if not _complete(entry):
                    say(f"Quantizing {source.name} to {quantization.type} (once; kept in {store})")
                    _build(source, quantization, dtype, entry, device)
    if shared is not None:
        shared.put(entry)
    return entry


class SharedBases(Protocol):
    """Entries that all machines of a run reach."""

    def fetch(self, entry: Path) -> None:
        """Put an entry in its place on this machine, if it is shared."""

    def put(self, entry: Path) -> None:
        """Share an entry, if it is not."""


class SharedFolder:
    """Shared entries in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, entry: Path) -> None:
        """Copy a whole entry from the folder.

        Raises:
            OrchestratorError: the disk does not take it.
        """
        if _complete(self._folder / entry.name):
            _copy(self._folder / entry.name, entry)

    def put(self, entry: Path) -> None:
        """Copy an entry to the folder.

        Raises:
            OrchestratorError: the disk does not take it.
        """
        target = self._folder / entry.name
        if not _complete(target):
            _remove_left(target)
            _copy(entry, target)


def _remove_left(entry: Path) -> None:
    """Remove what killed processes left beside an entry.

    What is less than a day old may be another machine's, at work.
    """
    for left in entry.parent.glob(f".{entry.name}-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime >= _DAY_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _copy(entry: Path, target: Path) -> None:
    """Copy a whole entry, beside and renamed.

    Raises:
        OrchestratorError: the disk does not take it.
    """
    try:
        with _beside(target) as folder:
            shutil.copytree(entry, folder, dirs_exist_ok=True)
    except OSError as error:
        raise OrchestratorError(
            f"The quantized base cannot be copied to {target}: {error}. Make room there, and run "
            "the same command again"
        ) from error


def tokenizer(
    source: ModelSource, quantization: QuantizationConfig, dtype: torch.dtype, store: Path
) -> Any:
    """The model's tokenizer: from its store entry where there is one, else from its source.

    Raises:
        ModelError: the model brings no tokenizer that can be read.
    """
    entry = store / entry_key(source, quantization, dtype)
    if _complete(entry):
        return load_tokenizer(entry, trust_remote_code=source.trust_remote_code)
    try:
        return load_tokenizer(source.folder, source.gguf_file, source.trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        first = first_line(error)
        raise ModelError(f"model.base: {source.name} has no usable tokenizer: {first}") from error


def _complete(entry: Path) -> bool:
    """Whether an entry holds every file it was written with, whole."""
    try:
        sizes = json.loads((entry / ENTRY).read_text())["files"]
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _build(
    source: ModelSource,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    entry: Path,
    device: torch.device,
) -> None:
    with _beside(entry) as folder:
        _quantize(source, quantization, dtype, folder, device)
        sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()}
        record = {"files": sizes, "dtype": str(dtype).removeprefix("torch."), "name": source.name}
        (folder / ENTRY).write_text(json.dumps(record, indent=1))


@contextmanager
def _beside(entry: Path) -> Iterator[Path]:
    """A folder that takes the entry's place once it is whole."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        yield folder
        _put_in_place(folder, entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(folder: Path, entry: Path) -> None:
    """Rename a whole folder to its entry; a damaged entry makes room.

    Machines that share the store have no lock, so nothing is deleted in its place: it could be
    what another one has put there since it was looked at. A whole one that is there stays.
    """
    for _ in range(_ATTEMPTS):
        try:
            folder.replace(entry)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if _complete(entry):
            return
        with (
            TemporaryDirectory(
                prefix=f".{entry.name}-", dir=entry.parent, ignore_cleanup_errors=True
            ) as aside,
            suppress(FileNotFoundError),  # another machine has moved it first
        ):
            entry.replace(aside)
            if _complete(Path(aside)):
                # Another machine has put a whole one there meanwhile.
                with suppress(OSError):
                    Path(aside).replace(entry)
    raise OSError(errno.ENOTEMPTY, "it is damaged, and others put it back", str(entry))


def _quantize(
    source: ModelSource,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    folder: Path,
    device: torch.device,
) -> None:
    trust = source.trust_remote_code
    origin = _readable(source, dtype, folder / "dense")
    settings = None if quantization.type == "none" else bnb_config(quantization, dtype)
    model = load_dense(origin, device, dtype, settings)
    model.save_pretrained(folder)
    load_tokenizer(origin.folder, origin.gguf_file, trust).save_pretrained(folder)
    if trust:
        for code in source.folder.glob("*.py"):
            shutil.copy(code, folder / code.name)
    check_architecture(model)
    shutil.rmtree(folder / "dense", ignore_errors=True)
    # Layers and their weights name each other: without this they stay beside the mapped entry.
    del model
    gc.collect()


def _readable(source: ModelSource, dtype: torch.dtype, folder: Path) -> ModelSource:
    """The model in a form that can be read tensor by tensor: itself, or else a dense copy."""
    try:
        if source.gguf_file is None or read_one_by_one(source.folder / source.gguf_file):
            return source
    except (ValueError, OSError) as error:
        raise ModelError(f"model.base: {source.name} cannot be read as GGUF: {error}") from error
    dequantize_gguf(source, dtype, folder)
    return replace(source, folder=folder, gguf_file=None)


def bnb_config(quantization: QuantizationConfig, dtype: torch.dtype) -> Any:
    """What transformers quantizes with."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
