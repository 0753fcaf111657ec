"""From a job's data section to encoded training and validation sets, through a cache.

An entry is made once under a lock, beside, and renamed; its name is the content address of the
rows, the settings and the tokenizer.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from filelock import FileLock

from orchestrator.config import DataConfig, Source
from orchestrator.data import encoding
from orchestrator.data.chat import Rendered, render, template_kind
from orchestrator.data.dataset import Counts, DatasetWriter, EncodedDataset, read_record
from orchestrator.data.encoding import Example
from orchestrator.data.formats import FORMATS, BadRowError, check_columns, detect, rename
from orchestrator.data.sources import Origin, Row, locate
from orchestrator.errors import DataError

_LOCK_SECONDS = 4 * 3600
_BATCH = 512
_SHOWN_BAD_ROWS = 5
# Rows whose columns decide an automatic format.
_LOOKED_AT = 20


@dataclass(frozen=True)
class Encoded:
    """One source, encoded: its examples, its format, and what became of its rows."""

    dataset: EncodedDataset
    source: str
    format: str
    counts: Counts


@dataclass(frozen=True)
class PreparedData:
    """The sets a job trains on and is measured on.

    template: `model` for the model's own chat template, `plain` for ours.
    """

    train: EncodedDataset
    validation: EncodedDataset | None
    sources: tuple[Encoded, ...]
    template: str
    digest: str

    def summary(self) -> str:
        """What was chosen and what was left out, for the user."""
        lines = []
        for part in self.sources:
            counts = part.counts
            lost = [
                f"{number} {what}"
                for number, what in (
                    (counts.bad, "bad rows skipped"),
                    (counts.cut, "cut to max_length"),
                    (counts.dropped, "dropped as too long"),
                    (counts.untrained, "left out with nothing to train on"),
                )
                if number
            ]
            lines.append(
                f"Data {part.source}: format {part.format}, {counts.rows} rows, "
                f"{counts.examples} examples, {counts.tokens:,} tokens, "
                f"{counts.targets:,} trained" + "".join(f", {item}" for item in lost)
            )
        held_out = 0 if self.validation is None else len(self.validation)
        kind = "the model's own chat template" if self.template == "model" else "the plain template"
        lines.append(f"{len(self.train)} training and {held_out} validation examples, {kind}")
        return "\n".join(lines)


def prepare(
    config: DataConfig, tokenizer: Any, cache_dir: Path, max_length: int | None = None
) -> PreparedData:
    """Encode a job's data, or open what was encoded before.

    Args:
        config: the job's data section.
        tokenizer: the model's tokenizer, a chat template with it where it has one.
        cache_dir: where encoded sets are kept.
        max_length: a bound of the model's own, where it is below `data.max_length`.

    Raises:
        DataError: a source cannot be read, a row is bad, or nothing is left to train on.
    """
    check_columns(config.format, config.columns)
    limit = min(config.max_length, max_length or config.max_length)
    config = config.model_copy(update={"max_length": limit})
    train = _encoded(config.train, "data.train", config, tokenizer, cache_dir)
    kind = template_kind(tokenizer)
    if config.validation is None:
        return PreparedData(train.dataset, None, (train,), kind, train.dataset.digest)
    if isinstance(config.validation, float):
        training, held_out = _split(train, config.validation)
        digest = _digest({"train": train.dataset.digest, "share": config.validation})
        return PreparedData(training, held_out, (train,), kind, digest)
    other = _encoded(config.validation, "data.validation", config, tokenizer, cache_dir)
    digest = _digest({"train": train.dataset.digest, "validation": other.dataset.digest})
    return PreparedData(train.dataset, other.dataset, (train, other), kind, digest)


def _split(encoded: Encoded, share: float) -> tuple[EncodedDataset, EncodedDataset]:
    """Hold out the examples with the smallest content hashes; equal ones stay together."""
    hashes = encoded.dataset.hashes
    wanted = max(1, round(share * len(hashes)))
    border = np.partition(hashes, wanted - 1)[wanted - 1]
    held_out, training = np.flatnonzero(hashes <= border), np.flatnonzero(hashes > border)
    if not len(training):
        raise DataError(
            f"data.validation: {share} of the {len(hashes)} examples of {encoded.source} leaves "
            "none to train on; give more rows, a source of its own, or null"
        )
    return encoded.dataset.subset(training), encoded.dataset.subset(held_out)


def _encoded(
    source: Source, key: str, config: DataConfig, tokenizer: Any, cache_dir: Path
) -> Encoded:
    origin = locate(source, key)
    digest = _digest(
        {
            "rows": origin.digest(),
            "settings": config.model_dump(exclude={"train", "validation"}),
            "tokenizer": _tokenizer_digest(tokenizer),
            "version": encoding.VERSION,
        }
    )
    folder = cache_dir / digest
    record = read_record(folder)
    if record is None:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=_LOCK_SECONDS):
            record = read_record(folder)
            if record is None:
                record = _build(origin, key, config, tokenizer, folder)
    dataset = EncodedDataset(folder, digest)
    return Encoded(dataset, origin.name, record["format"], Counts(**record["counts"]))


def _build(
    origin: Origin, key: str, config: DataConfig, tokenizer: Any, folder: Path
) -> dict[str, Any]:
    beside = Path(mkdtemp(prefix=f".{folder.name[:16]}-", dir=folder.parent))
    try:
        rows = origin.rows()
        head = list(islice(rows, _LOOKED_AT))
        name: str = config.format
        if name == "auto":
            present = {column for row in head for column in row.value}
            name = detect(present, config.columns, f"{key}: {origin.name}").name
        with DatasetWriter(beside) as writer:
            encoder = _Encoder(config, name, tokenizer, writer)
            encoder.run(_chain(head, rows))
            if not encoder.counts.examples:
                raise DataError(f"{key}: {origin.name} {_nothing_left(encoder.counts)}")
            writer.finish(encoder.counts, {"format": name, "source": origin.name})
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return {"format": name, "counts": asdict(encoder.counts)}


class _Encoder:
    """Encodes rows in batches and counts what becomes of them."""

    def __init__(
        self, config: DataConfig, name: str, tokenizer: Any, writer: DatasetWriter
    ) -> None:
        self._config, self._format = config, FORMATS[name]
        self._tokenizer, self._writer = tokenizer, writer
        self._bad: list[str] = []
        self.counts = Counts()

    def run(self, rows: Iterator[Row]) -> None:
        """Encode every row.

        Raises:
            DataError: rows are bad and `on_bad_row` is `refuse`.
        """
        while batch := list(islice(rows, _BATCH)):
            rendered = [text for row in batch if (text := self._render(row)) is not None]
            self._count(rows=len(batch))
            examples = encoding.encode(rendered, self._tokenizer, self._config.train_on == "all")
            for text, example in zip(rendered, examples, strict=True):
                self._keep(example, text)
            if len(self._bad) >= _SHOWN_BAD_ROWS:
                break
        self._refuse_bad()

    def _render(self, row: Row) -> Rendered | None:
        try:
            if row.problem is not None:
                raise BadRowError(row.problem)
            value = rename(row.value, self._format, self._config.columns)
            return render(self._format.read(value), self._tokenizer)
        except BadRowError as error:
            self._count(bad=1)
            if self._config.on_bad_row == "refuse":
                self._bad.append(f"{row.place}: {error}")
            return None

    def _keep(self, example: Example, text: Rendered) -> None:
        limit = self._config.max_length
        if len(example.ids) > limit:
            if self._config.too_long == "drop":
                self._count(dropped=1)
                return
            example = encoding.cut(example, limit, text.spans[-1][0] > 0)
            self._count(cut=1)
        targets = int(example.trained[1:].sum())
        if not targets:
            self._count(untrained=1)
            return
        content = hashlib.blake2b(
            example.ids.tobytes() + example.trained.tobytes(), digest_size=8
        ).digest()
        self._writer.append(example, int.from_bytes(content, "big"))
        self._count(examples=1, tokens=len(example.ids), targets=targets)

    def _refuse_bad(self) -> None:
        if not self._bad:
            return
        shown = "\n  ".join(self._bad[:_SHOWN_BAD_ROWS])
        raise DataError(
            f"The data has rows that do not fit the format {self._format.name}:\n  {shown}\n"
            "Mend them, or set data.on_bad_row: skip to leave such rows out"
        )

    def _count(self, **more: int) -> None:
        added = {name: getattr(self.counts, name) + number for name, number in more.items()}
        self.counts = replace(self.counts, **added)


def _nothing_left(counts: Counts) -> str:
    if not counts.rows:
        return "is empty"
    reasons = (
        (counts.bad, "were bad"),
        (counts.dropped, "were longer than data.max_length"),
        (counts.untrained, "had nothing to train on"),
    )
    listed = ", ".join(f"{number} {what}" for number, what in reasons if number)
    return f"has nothing left to train on: of {counts.rows} rows {listed}"


def _chain(head: list[Row], rest: Iterator[Row]) -> Iterator[Row]:
    yield from head
    yield from rest


def _tokenizer_digest(tokenizer: Any) -> str:
    """Identity of a tokenizer: its vocabulary and rules, its chat template, its special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return _digest({"rules": rules, "template": tokenizer.chat_template, "special": special})


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
