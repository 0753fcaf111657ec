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
from orchestrator.data.formats import FORMATS
from orchestrator.errors import DataError, first_line

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
# What `datasets` writes beside rows.
_ABOUT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


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
        """Changes whenever the rows do: SHA-256 of the files' bytes, or the data set's own.

        Raises:
            DataError: a file cannot be read.
        """
        total = hashlib.sha256()
        for file in self.files:
            try:
                with file.open("rb") as stream:
                    total.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error}") from error
            # The same bytes are other rows under another suffix.
            total.update(file.suffix.lower().encode())
        if self.dataset is not None:
            total.update(self.dataset._fingerprint.encode())
        return total.hexdigest()

    def stamp(self) -> list[tuple[int, int]]:
        """Sizes and times of the files, which tell that one was changed while it was read.

        Raises:
            DataError: a file cannot be read.
        """
        try:
            stats = [file.stat() for file in self.files]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error}") from error
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

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
    saved = [name for name in names if _is_saved(Path(name).expanduser())]
    if saved and len(names) > 1:
        raise DataError(f"{key}: {saved[0]} is a saved data set; give it alone, not in a list")
    if saved:
        return Origin(names[0], dataset=_load_saved(Path(names[0]).expanduser(), key))
    files = [file for name in names for file in _files(Path(name).expanduser(), key)]
    return Origin(", ".join(names), tuple(files))


def _files(path: Path, key: str) -> list[Path]:
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in _SUFFIXES
            and file.name not in _ABOUT_ROWS
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not found:
            raise DataError(f"{key}: {path} holds no {', '.join(_SUFFIXES)} file")
        return found
    if not path.is_file():
        raise DataError(f"{key}: {path} does not exist{_nearest(path)}")
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(f"{key}: {path} is none of {', '.join(_SUFFIXES)}")
    return [path]


def _nearest(path: Path) -> str:
    """A hint at the most similar name in the folder of a missing path."""
    siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
    close = get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _read(file: Path) -> Iterator[Row]:
    readers = {".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        yield from readers.get(file.suffix.lower(), _read_lines)(file)
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
    except (ValueError, RecursionError) as error:
        return Row(place, {}, f"JSON that cannot be read: {error}")


def _checked(place: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(place, value)
    return Row(place, {}, f"a row is an object with columns, this is {type(value).__name__}")


def _read_json(file: Path) -> Iterator[Row]:
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} is not one JSON value ({error}). If it has one object a line, name it .jsonl"
        ) from error
    if isinstance(content, dict):
        content = _wrapped(content)
    if not isinstance(content, list):
        raise DataError(f"{file} holds no list of rows")
    for number, value in enumerate(content, 1):
        yield _checked(f"{file} row {number}", value)


def _wrapped(content: dict[str, Any]) -> list[Any]:
    """The rows of a file that holds one object: its only list of objects, or else the object.

    An object with the columns of a format is a row, whatever lists are in it; but a text beside a
    list of objects describes them.
    """
    lists = [value for value in content.values() if _may_hold_rows(value)]
    formats = [format for format in FORMATS.values() if format.name != "text"]
    is_row = any(set(format.required) <= content.keys() for format in formats)
    return [content] if is_row or len(lists) != 1 else lists[0]


def _may_hold_rows(value: Any) -> bool:
    return isinstance(value, list) and (not value or any(isinstance(v, dict) for v in value))


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # Bytes that are no UTF-8 become lone surrogates, which make their own row a bad one.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header: list[str] | None = None
        while True:
            place = f"{file}:{reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if header is None:
                    raise DataError(f"{place}: not readable as CSV: {error}") from error
                yield Row(place, {}, f"not CSV: {error}")
                continue
            if header is None:
                header = fields or None
            elif len(fields) == len(header):
                yield Row(place, dict(zip(header, fields, strict=True)))
            elif fields:
                count = f"{len(fields)} fields, the header {len(header)}"
                yield Row(place, {}, f"it has {count}")


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{file} row {number}", value)
    except pa.ArrowException as error:
        raise DataError(f"{file} cannot be read as parquet: {error}") from error


def _looks_like_hub(name: str) -> bool:
    """`owner/name`, with an optional `:split` or `:config:split`, where no such path is here."""
    path = Path(name).expanduser()
    if path.exists() or path.suffix.lower() in _SUFFIXES or name.startswith((".", "/", "~")):
        return False
    return name.count("/") == 1


def _load_hub(name: str, key: str) -> Any:
    import datasets

    repository, _, wanted = name.partition(":")
    config, colon, split = wanted.partition(":")
    if not colon or "[" in config:
        # A split may be a slice with a colon of its own, such as train[:1000].
        config, split = "", wanted
    try:
        return datasets.load_dataset(repository, config or None, split=split or "train")
    except Exception as error:
        # Whatever a loader of a foreign data set raises, the user can do the same about it.
        near = _nearest(Path(name)) or "."
        first = first_line(error)
        raise DataError(
            f"{key}: {name} is no path here{near} It could not be loaded from the hub "
            f"either ({first}). Check the name, the split (owner/name:split; of a data set with "
            "several configurations, owner/name:config:split), HF_TOKEN and the network, or give a "
            "local file such as ./train.jsonl"
        ) from error


def _is_saved(path: Path) -> bool:
    """Whether `datasets` saved this folder with save_to_disk."""
    one = all((path / name).is_file() for name in ("dataset_info.json", "state.json"))
    return one or (path / "dataset_dict.json").is_file()


def _load_saved(path: Path, key: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{key}: {path} cannot be read as a saved data set: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        folders = ", ".join(str(path / split) for split in loaded)
        raise DataError(f"{key}: {path} holds splits; give the folder of one: {folders}")
    return loaded.with_format(None)
