"""Files, folders and hub ids become rows, each with its place. Reads as a stream."""

import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from orchestrator.config import Source
from orchestrator.errors import DataError

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row of a source. `problem` says why it could not be read; then `value` is empty."""

    place: str
    value: dict[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where rows come from: files here, or a data set loaded by `datasets`."""

    name: str
    files: tuple[Path, ...] = ()
    dataset: Any = None

    def digest(self) -> str:
        """Changes whenever the rows do: SHA-256 of the files' bytes, or the data set's own."""
        total = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        if self.dataset is not None:
            total.update(self.dataset._fingerprint.encode())
        return total.hexdigest()

    def rows(self) -> Iterator[Row]:
        """Every row, in order."""
        for file in self.files:
            yield from _read(file)
        if self.dataset is not None:
            for number, value in enumerate(self.dataset, 1):
                yield Row(f"{self.name} row {number}", value)


def locate(source: Source, key: str) -> Origin:
    """Find what a source names.

    Args:
        source: one path or hub id, or several paths.
        key: the job file's key, for error messages.

    Raises:
        DataError: nothing is there, or it is of a kind that cannot be read.
    """
    names = (source,) if isinstance(source, str) else source
    if len(names) == 1 and _looks_like_hub(names[0]):
        return Origin(names[0], dataset=_load_hub(names[0], key))
    if len(names) == 1 and (Path(names[0]).expanduser() / "dataset_info.json").is_file():
        return Origin(names[0], dataset=_load_saved(names[0], key))
    files = [file for name in names for file in _files(Path(name).expanduser(), key)]
    return Origin(", ".join(names), tuple(files))


def _files(path: Path, key: str) -> list[Path]:
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in _SUFFIXES
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not found:
            raise DataError(f"{key}: {path} holds no {', '.join(_SUFFIXES)} file")
        return found
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        close = get_close_matches(path.name, siblings, n=1)
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        raise DataError(f"{key}: {path} does not exist{hint}")
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{key}: {path} is none of {', '.join(_SUFFIXES)}")
    return [path]


def _read(file: Path) -> Iterator[Row]:
    readers = {".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        yield from readers.get(file.suffix, _read_lines)(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _read_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _parsed(f"{file}:{number}", line)


def _parsed(place: str, line: bytes) -> Row:
    try:
        return _checked(place, json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return Row(place, {}, f"not UTF-8 text ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        return Row(place, {}, f"not JSON: {error.msg} at column {error.colno}")


def _checked(place: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(place, value)
    return Row(place, {}, f"a row is an object with columns, this is {type(value).__name__}")


def _read_json(file: Path) -> Iterator[Row]:
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{file} is not one JSON value ({error}). If it has one object a line, name it .jsonl"
        ) from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else [content]
    if not isinstance(content, list):
        raise DataError(f"{file} holds no list of rows")
    for number, value in enumerate(content, 1):
        yield _checked(f"{file} row {number}", value)


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            for value in reader:
                place = f"{file}:{reader.line_num}"
                if None in value or None in value.values():
                    yield Row(place, {}, "it has more or fewer fields than the header")
                else:
                    yield Row(place, value)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{file}:{reader.line_num}: not readable as CSV: {error}") from error


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{file} row {number}", value)
    except pa.ArrowException as error:
        raise DataError(f"{file} cannot be read as parquet: {error}") from error


def _looks_like_hub(name: str) -> bool:
    """`owner/name`, with an optional `:split`, where no such path is here."""
    path = Path(name).expanduser()
    if path.exists() or path.suffix in _SUFFIXES or name.startswith((".", "/", "~")):
        return False
    return name.count("/") == 1


def _load_hub(name: str, key: str) -> Any:
    import datasets

    repository, _, split = name.partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train")
    except Exception as error:
        # Whatever a loader of a foreign data set raises, the user can do the same about it.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{key}: {name} is no path here and could not be loaded from the hub ({first}). Check "
            "the name, the split (owner/name:split), HF_TOKEN and the network, or give a local file"
        ) from error


def _load_saved(name: str, key: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(name)
    except (OSError, ValueError) as error:
        raise DataError(f"{key}: {name} cannot be read as a saved data set: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"{key}: {name} holds several splits; give the folder of one")
    return loaded
