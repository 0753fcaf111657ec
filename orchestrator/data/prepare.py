"""From a job's data section to encoded training and validation sets, through a cache.

An entry is made once under a lock, beside, and renamed; its name is the content address of the
rows, the settings and the tokenizer.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from orchestrator.config import DataConfig, Source
from orchestrator.data import encoding
from orchestrator.data.chat import Rendered, Renderer, chat_template, template_kind
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
    """One source, encoded: its examples, its format, and what became of its rows.

    columns: the format's columns and the data's own names for them. detected: the format was
    chosen by these columns. cached: nothing was encoded, the cache had it.
    """

    dataset: EncodedDataset
    source: str
    format: str
    counts: Counts
    columns: dict[str, str] = field(default_factory=dict)
    detected: bool = False
    cached: bool = False

    def summary(self) -> str:
        """One line for the user."""
        counts = self.counts
        named = ", ".join(self.columns[name] for name in FORMATS[self.format].required)
        why = f" (detected by: {named})" if self.detected else ""
        lost = (
            (counts.bad, "bad rows skipped"),
            (counts.cut, "cut to max_length"),
            (counts.dropped, "dropped as too long"),
            (counts.untrained, "left out with nothing to train on"),
        )
        return (
            f"Data {self.source}: format {self.format}{why}, {counts.rows} rows, "
            f"{counts.examples} examples, {counts.tokens:,} tokens, {counts.targets:,} trained"
            + "".join(f", {number} {what}" for number, what in lost if number)
            + (", from the cache" if self.cached else "")
        )


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

    @property
    def format(self) -> str:
        """The training source's format."""
        return self.sources[0].format

    @property
    def columns(self) -> dict[str, str]:
        """The training source's columns: the format's name and the data's own."""
        return self.sources[0].columns

    @property
    def counts(self) -> Counts:
        """What became of the training source's rows, those held out for validation included."""
        return self.sources[0].counts

    def summary(self) -> str:
        """What was chosen and what was left out, for the user."""
        lines = [part.summary() for part in self.sources]
        held_out = 0 if self.validation is None else len(self.validation)
        kind = "the model's own chat template" if self.template == "model" else "the plain template"
        lines.append(f"{len(self.train)} training and {held_out} validation examples, {kind}")
        return "\n".join(lines)


def prepare(
    config: DataConfig,
    tokenizer: Any,
    cache_dir: Path,
    max_length: int | None = None,
    *,
    tokenizer_digest: str | None = None,
    trust_remote_code: bool = False,
) -> PreparedData:
    """Encode a job's data, or open what was encoded before.

    Args:
        config: the job's data section.
        tokenizer: the model's tokenizer, a chat template with it where it has one.
        cache_dir: where encoded sets are kept.
        max_length: a bound of the model's own, where it is below `data.max_length`.
        tokenizer_digest: the tokenizer's identity where the caller knows it; else it is computed.
        trust_remote_code: has no effect: `datasets` runs no code of a data set's any more.

    Raises:
        DataError: a source cannot be read, a row is bad, or nothing is left to train on.
    """
    check_columns(config.format, config.columns)
    limit = min(config.max_length, max_length or config.max_length)
    config = config.model_copy(update={"max_length": limit})
    identity = tokenizer_digest or _tokenizer_digest(tokenizer)
    train = _encoded(config.train, "data.train", config, tokenizer, identity, cache_dir)
    kind = template_kind(tokenizer)
    if config.validation is None:
        return PreparedData(train.dataset, None, (train,), kind, train.dataset.digest)
    if isinstance(config.validation, float):
        training, held_out = _split(train, config.validation)
        digest = _digest({"train": train.dataset.digest, "share": config.validation})
        return PreparedData(training, held_out, (train,), kind, digest)
    other = _encoded(config.validation, "data.validation", config, tokenizer, identity, cache_dir)
    digest = _digest({"train": train.dataset.digest, "validation": other.dataset.digest})
    return PreparedData(train.dataset, other.dataset, (train, other), kind, digest)


def _split(encoded: Encoded, share: float) -> tuple[EncodedDataset, EncodedDataset]:
    """Hold out the examples with the smallest content hashes; equal ones stay together."""
    dataset = encoded.dataset
    values, group, sizes = np.unique(dataset.hashes, return_inverse=True, return_counts=True)
    if len(values) < 2:
        raise DataError(
            f"data.validation: {share} of the {len(dataset)} examples of {encoded.source} leaves "
            "none to train on, as equal examples stay together; give more rows, a source of its "
            "own, or null"
        )
    held_out = _groups(sizes, min(max(1, round(share * len(dataset))), len(dataset) - 1))[group]
    return (
        dataset.part(f"{share!r}-training.places", np.flatnonzero(~held_out)),
        dataset.part(f"{share!r}-validation.places", np.flatnonzero(held_out)),
    )


def _groups(sizes: NDArray[np.int64], wanted: int) -> NDArray[np.bool_]:
    """The first groups that together have at most `wanted` members, or else the smallest."""
    chosen = np.cumsum(sizes) <= wanted
    left = wanted - int(sizes[chosen].sum())
    for index in range(int(chosen.sum()), len(sizes)):
        if not left:
            break
        if sizes[index] <= left:
            chosen[index] = True
            left -= int(sizes[index])
    if not chosen.any():
        chosen[np.argmin(sizes)] = True
    return chosen


def _encoded(
    source: Source, key: str, config: DataConfig, tokenizer: Any, identity: str, cache_dir: Path
) -> Encoded:
    origin = locate(source, key)
    before = origin.stamp()
    digest = _digest(
        {
            "rows": origin.digest(),
            "settings": config.model_dump(exclude={"train", "validation"}),
            "tokenizer": identity,
            "version": encoding.VERSION,
        }
    )
    folder = cache_dir / digest
    record = read_record(folder)
    cached = record is not None
    if record is None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock", timeout=_LOCK_SECONDS):
                record = read_record(folder) or _build(
                    origin, before, key, config, tokenizer, folder
                )
        except OSError as error:
            raise DataError(f"The cache folder {cache_dir} cannot be used: {error}") from error
    dataset = EncodedDataset(folder, digest)
    chosen = FORMATS[record["format"]]
    names = (*chosen.required, *chosen.optional)
    return Encoded(
        dataset,
        origin.name,
        chosen.name,
        Counts(**record["counts"]),
        {name: config.columns.get(name, name) for name in names},
        config.format == "auto",
        cached,
    )


def _build(
    origin: Origin,
    before: list[tuple[int, int]],
    key: str,
    config: DataConfig,
    tokenizer: Any,
    folder: Path,
) -> dict[str, Any]:
    """Encode an origin whose files had the stamp `before` when their digest was taken."""
    prefix = f".{folder.name}-"
    for left in folder.parent.glob(f"{prefix}*"):
        # A builder that was killed left it: we hold the lock.
        shutil.rmtree(left, ignore_errors=True)
    beside = Path(mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        rows = origin.rows()
        head = list(islice(rows, _LOOKED_AT))
        name = _format(head, config, f"{key}: {origin.name}")
        with DatasetWriter(beside) as writer:
            encoder = _Encoder(config, name, tokenizer, writer)
            encoder.run(chain(head, rows))
            if not encoder.counts.examples:
                raise DataError(f"{key}: {origin.name} {_nothing_left(encoder.counts)}")
            if origin.stamp() != before:
                raise DataError(f"{key}: {origin.name} was changed while it was read; start again")
            writer.finish(encoder.counts, {"format": name, "source": origin.name})
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return {"format": name, "counts": asdict(encoder.counts)}


def _format(head: Sequence[Row], config: DataConfig, source: str) -> str:
    if config.format != "auto":
        return config.format
    columns = [row.value.keys() for row in head]
    bad = [f"{row.place}: {row.problem}" for row in head if row.problem is not None]
    if bad and not any(columns):
        shown = "\n  ".join(bad[:_SHOWN_BAD_ROWS])
        raise DataError(f"{source}: none of the first {len(head)} rows can be read:\n  {shown}")
    return detect(columns, config.columns, source).name


class _Encoder:
    """Encodes rows in batches and counts what becomes of them."""

    def __init__(
        self, config: DataConfig, name: str, tokenizer: Any, writer: DatasetWriter
    ) -> None:
        self._config, self._format = config, FORMATS[name]
        self._tokenizer, self._writer = tokenizer, writer
        self._renderer = Renderer(tokenizer)
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
            if self._bad:
                # Nothing will be trained on: the rest is read for the number of bad rows alone.
                continue
            examples = encoding.encode(rendered, self._tokenizer, self._config.train_on == "all")
            fitted = [
                self._fit(example, text) for example, text in zip(examples, rendered, strict=True)
            ]
            self._keep([example for example in fitted if example is not None])
        self._refuse_bad()

    def _render(self, row: Row) -> Rendered | None:
        try:
            if row.problem is not None:
                raise BadRowError(row.problem)
            value = rename(row.value, self._format, self._config.columns)
            return self._renderer.render(self._format.read(value))
        except BadRowError as error:
            self._count(bad=1)
            if self._config.on_bad_row == "refuse" and len(self._bad) < _SHOWN_BAD_ROWS:
                self._bad.append(f"{row.place}: {error}")
            return None

    def _fit(self, example: Example, text: Rendered) -> Example | None:
        """The example within max_length, or None where it is left out."""
        limit = self._config.max_length
        if len(example.ids) > limit:
            if self._config.too_long == "drop":
                self._count(dropped=1)
                return None
            example = encoding.cut(example, limit, text.spans[-1][0] > 0)
            self._count(cut=1)
        if not example.trained[1:].any():
            self._count(untrained=1)
            return None
        return example

    def _keep(self, examples: Sequence[Example]) -> None:
        self._writer.extend(examples, [_content_hash(example) for example in examples])
        self._count(
            examples=len(examples),
            tokens=sum(len(example.ids) for example in examples),
            targets=sum(int(np.count_nonzero(example.trained[1:])) for example in examples),
        )

    def _refuse_bad(self) -> None:
        if not self._bad:
            return
        shown = "\n  ".join(self._bad[:_SHOWN_BAD_ROWS])
        raise DataError(
            f"{self.counts.bad} of {self.counts.rows} rows do not fit the format "
            f"{self._format.name}; the first:\n  {shown}\n"
            "Mend them, or set data.on_bad_row: skip to leave such rows out"
        )

    def _count(self, **more: int) -> None:
        added = {name: getattr(self.counts, name) + number for name, number in more.items()}
        self.counts = replace(self.counts, **added)


def _content_hash(example: Example) -> int:
    content = example.ids.tobytes() + example.trained.tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


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


def _tokenizer_digest(tokenizer: Any) -> str:
    """Identity of a tokenizer: its vocabulary and rules, its chat template, its special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    # One that was saved and loaded again has other ends of lines.
    template = chat_template(tokenizer)
    return _digest(
        {
            "kind": type(tokenizer).__name__,
            "rules": rules,
            "template": template and template.replace("\r\n", "\n"),
            "special": special,
        }
    )


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
