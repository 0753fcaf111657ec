"""Encoded examples in flat, memory-mapped files: no copy per worker, none in memory."""

import json
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from orchestrator.data.encoding import Example

_DTYPES = {
    "ids": np.int32,
    "trained": np.bool_,
    "ends": np.int64,
    "targets": np.int32,
    "answers": np.int32,
    "hashes": np.uint64,
}
_RECORD = "record.json"
# What the files were when all their bytes were last read.
_CHECKED = "checked.json"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Counts:
    """What became of a source's rows."""

    rows: int = 0
    examples: int = 0
    bad: int = 0
    cut: int = 0
    dropped: int = 0
    untrained: int = 0
    tokens: int = 0
    targets: int = 0


class EncodedDataset:
    """Read-only examples of a cache entry, or some of them. Pickles as a path.

    Attributes:
        digest: changes whenever the examples of the whole entry do.
    """

    def __init__(
        self, folder: Path, digest: str, chosen: str | NDArray[np.int64] | None = None
    ) -> None:
        """Map an entry's files; `chosen` is a part's file in the folder, or places."""
        self.folder, self.digest, self._origin = folder, digest, chosen
        self._chosen: NDArray[np.int64] | None = (
            np.memmap(folder / chosen, dtype=np.int64, mode="r")
            if isinstance(chosen, str)
            else chosen
        )
        self._files = {
            name: np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r")
            for name, dtype in _DTYPES.items()
        }

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._files["ends"] if self._chosen is None else self._chosen)

    def __getitem__(self, index: int) -> Example:
        """One example; its arrays are views of the mapped files."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = index if self._chosen is None else int(self._chosen[index])
        ends = self._files["ends"]
        part = slice(int(ends[place - 1]) if place else 0, int(ends[place]))
        return Example(
            np.asarray(self._files["ids"][part]),
            np.asarray(self._files["trained"][part]),
            int(self._files["answers"][place]),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as a path; the receiver maps the same files."""
        return EncodedDataset, (self.folder, self.digest, self._origin)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 (examples,): tokens of each example."""
        return self._select(np.diff(self._files["ends"], prepend=0))

    @property
    def target_counts(self) -> NDArray[np.int32]:
        """int32 (examples,): target tokens of each example."""
        return self._select(self._files["targets"])

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """uint64 (examples,): a hash of each example's content."""
        return self._select(self._files["hashes"])

    def subset(self, places: NDArray[np.int64]) -> "EncodedDataset":
        """The examples at these places; no example is copied."""
        chosen = places if self._chosen is None else self._chosen[places]
        return EncodedDataset(self.folder, self.digest, chosen)

    def part(self, name: str, places: NDArray[np.int64]) -> "EncodedDataset":
        """As `subset`, with the places in a mapped file of that name beside the examples."""
        path = self.folder / name
        chosen = self.subset(places)._chosen
        assert chosen is not None
        try:
            if not (path.is_file() and path.read_bytes() == chosen.tobytes()):
                with NamedTemporaryFile(dir=self.folder, delete=False) as beside:
                    beside.write(chosen.tobytes())
                Path(beside.name).replace(path)
        except OSError:
            # A cache that can only be read serves as well, with the places in memory.
            return EncodedDataset(self.folder, self.digest, chosen)
        return EncodedDataset(self.folder, self.digest, name)

    def _select(self, values: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(values if self._chosen is None else values[self._chosen])


class DatasetWriter:
    """Appends examples to a folder's files. A context manager; `finish` makes it whole."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._end = folder, 0
        self._sums = dict.fromkeys(_DTYPES, 0)
        self._streams = {name: (folder / f"{name}.bin").open("wb") for name in _DTYPES}

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams.values():
            stream.close()

    def extend(self, examples: Sequence[Example], hashes: Sequence[int]) -> None:
        """Add examples, with a hash of each one's content."""
        if not examples:
            return
        ends = self._end + np.cumsum([len(example.ids) for example in examples])
        self._end = int(ends[-1])
        values: dict[str, Any] = {
            "ids": np.concatenate([example.ids for example in examples]),
            "trained": np.concatenate([example.trained for example in examples]),
            "ends": ends,
            "targets": [np.count_nonzero(example.trained[1:]) for example in examples],
            "answers": [example.answer_start for example in examples],
            "hashes": hashes,
        }
        for name, value in values.items():
            content = np.asarray(value, dtype=_DTYPES[name]).tobytes()
            self._sums[name] = zlib.crc32(content, self._sums[name])
            self._streams[name].write(content)

    def finish(self, counts: Counts, details: dict[str, Any]) -> None:
        """Write the record that makes the entry valid."""
        for stream in self._streams.values():
            stream.flush()
        record = {"sums": self._sums, "counts": asdict(counts), **details}
        (self._folder / _RECORD).write_text(json.dumps(record, indent=1))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a whole entry; None where there is none or a file is damaged.

    A file that a crash left unwritten may have the right size, so every byte is read: once since
    the machine started, and again only after a file's size, time or inode has changed.
    """
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text())
        Counts(**record["counts"])
        if not record["format"]:
            return None
        stamp = _stamp(folder, record["sums"])
        if not _was_checked(folder, stamp):
            if record["sums"] != {name: _sum(folder / f"{name}.bin") for name in _DTYPES}:
                return None
            _note_checked(folder, stamp)
        return record
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stamp(folder: Path, sums: dict[str, int]) -> str:
    """Changes with the record's sums, with any file of the entry, and when the machine starts."""
    stats = [(folder / f"{name}.bin").stat() for name in _DTYPES]
    files = [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats]
    return json.dumps([sums, files, psutil.boot_time()])


def _was_checked(folder: Path, stamp: str) -> bool:
    try:
        return (folder / _CHECKED).read_text() == stamp
    except (OSError, ValueError):
        return False


def _note_checked(folder: Path, stamp: str) -> None:
    # A cache that can only be read serves as well: it is checked at every start.
    with suppress(OSError), NamedTemporaryFile("w", dir=folder, delete=False) as beside:
        beside.write(stamp)
        beside.flush()
        Path(beside.name).replace(folder / _CHECKED)


def _sum(path: Path) -> int:
    total = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total = zlib.crc32(block, total)
    return total
