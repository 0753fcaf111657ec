"""Checkpoints: written beside and renamed, checked when read, the newest whole one is used.

A checkpoint is a folder `step-00000050` of safetensors and one json with their SHA-256 digests.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.errors import CheckpointError

_STATE = "state.json"
# What reading a damaged checkpoint raises.
_DAMAGE = (OSError, ValueError, KeyError, SafetensorError)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: tensors by file name (without suffix), and the json's state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint under `folder`; it is there whole or not at all.

    Raises:
        CheckpointError: the storage refuses it (full, read-only, gone).
    """
    target = folder / _name(checkpoint.step)
    beside = folder / f".{target.name}.{os.getpid()}"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        digests = {}
        for name, tensors in checkpoint.tensors.items():
            file = beside / f"{name}.safetensors"
            save_file(tensors, file)
            digests[file.name] = _digest(file)
            _sync(file)
        content = {"step": checkpoint.step, "files": digests, "state": checkpoint.state}
        (beside / _STATE).write_text(json.dumps(content, indent=1))
        _sync(beside / _STATE)
        # One of the same step, whole or damaged, makes room at the last moment.
        aside = folder / f".{target.name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        if target.exists():
            target.replace(aside)
        beside.replace(target)
        _sync(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint of step {checkpoint.step} cannot be written to {folder}: {error}. "
            "Make room or give another output_dir, then run the same command again"
        ) from error
    return target


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named through `say` and passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return _read(path)
        except _DAMAGE as error:
            say(f"Checkpoint {path} is damaged ({error}); an older one is used")
    return None


def read(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of one step, whole.

    Raises:
        CheckpointError: it is not there or damaged.
    """
    return read_path(folder / _name(step))


def read_path(path: Path) -> Checkpoint:
    """The checkpoint in this folder, whole.

    Raises:
        CheckpointError: it is not there or damaged.
    """
    try:
        return _read(path)
    except _DAMAGE as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Is output_dir shared?") from error


def prune(folder: Path, step: int, keep: int, best_step: int | None) -> None:
    """Delete all but the `keep` newest checkpoints and the best one, and what kills left behind.

    Those of later steps than the present one are damaged and were passed over: they do not count.
    """
    paths = sorted((p for p in folder.glob("step-*") if p.name <= _name(step)), reverse=True)
    best = None if best_step is None else folder / _name(best_step)
    for path in paths[keep:]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def forget_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps."""
    for path in folder.glob("step-*"):
        if path.name > _name(step):
            shutil.rmtree(path, ignore_errors=True)


def _name(step: int) -> str:
    """Names sort as steps do."""
    return f"step-{step:08d}"


def _read(path: Path) -> Checkpoint:
    content = json.loads((path / _STATE).read_text())
    tensors = {}
    for name, digest in content["files"].items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} is not what was written")
        tensors[name.removesuffix(".safetensors")] = load_file(path / name)
    return Checkpoint(content["step"], tensors, content["state"])


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
