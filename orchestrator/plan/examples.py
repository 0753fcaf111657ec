"""How many examples a job trains on and how long they are, without tokenizing them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from orchestrator.config import DataConfig, ModelConfig

_LINES = (".jsonl", ".ndjson")
# Lines of so many bytes are counted in about a second.
_MOST_BYTES = 2**30
_SAMPLED = 64


@dataclass(frozen=True)
class Examples:
    """Training examples: how many, and the tokens of all of them.

    sure: `exactly` so many, `about` or `at most`.
    """

    count: int
    tokens: int
    sure: str


def count_examples(data: DataConfig, model: ModelConfig) -> Examples | None:
    """The training rows of local jsonl and parquet files; None where they are others.

    A line of JSON has about as many tokens as its example: keys and quotes in place of what a chat
    template adds. Without the model's tokenizer on this machine a token is taken for a byte.
    """
    names = (data.train,) if isinstance(data.train, str) else data.train
    paths = [Path(name).expanduser() for name in names]
    if not all(path.is_file() for path in paths):
        return None
    lines = [path for path in paths if path.suffix.lower() in _LINES]
    tables = [path for path in paths if path.suffix.lower() == ".parquet"]
    if len(lines) + len(tables) < len(paths):
        return None
    if sum(path.stat().st_size for path in lines) > _MOST_BYTES:
        return None
    rate = _tokens_per_byte(list(islice(_read(lines), _SAMPLED)), model)
    rows = sum(map(_parquet_rows, tables))
    tokens = rows * data.max_length
    for line in _read(lines):
        rows += 1
        tokens += min(math.ceil(len(line) * (rate or 1)), data.max_length)
    share = data.validation if isinstance(data.validation, float) else 0.0
    count = rows - round(share * rows)
    if not count:
        return None
    sure = "about" if rate and not tables else "at most"
    return Examples(count, math.ceil(tokens * count / rows), sure)


def _read(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as stream:
            yield from (line for line in stream if line.strip())


def _tokens_per_byte(lines: list[bytes], model: ModelConfig) -> float | None:
    """Of some lines of text; None where the tokenizer is not on this machine, or takes long."""
    from transformers import AutoTokenizer

    if not lines or model.base.endswith(".gguf"):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.base,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, ImportError):
        return None
    texts = [line.decode(errors="replace") for line in lines]
    count = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    return count / sum(map(len, lines))


def _parquet_rows(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except pa.ArrowException:
        # Whoever reads the rows says what is wrong with them.
        return 0
