"""Rendered texts become token ids, targets and the place where the last answer starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.chat import Rendered

# Changes whenever the same rows and settings would be encoded in another way.
VERSION = 3


@dataclass(frozen=True)
class Example:
    """An encoded row.

    ids: int32 (tokens,). trained: bool (tokens,), True where the token is a target; the first
    never counts. answer_start: place of the last answer's first token, so that
    `ids[:answer_start]` is a prompt.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    answer_start: int


def encode(rows: Sequence[Rendered], tokenizer: Any, train_all: bool) -> list[Example]:
    """Tokenize a batch of texts; a token that crosses a span's start belongs to the span."""
    if not rows:
        return []
    bos = _bos(tokenizer)
    prefixes = [[] if row.special else bos for row in rows]
    texts = [row.text for row in rows]
    if not tokenizer.is_fast:
        return [
            _encode_slowly(row, tokenizer, prefix, train_all)
            for row, prefix in zip(rows, prefixes, strict=True)
        ]
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    made = []
    for row, prefix, ids, offsets in zip(
        rows, prefixes, batch["input_ids"], batch["offset_mapping"], strict=True
    ):
        bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        starts, stops = bounds[:, 0], bounds[:, 1]
        trained = np.zeros(len(ids), dtype=bool)
        for first, last in row.spans:
            # Some tokenizers give blank space no width; on the border it is the template's.
            wide = (stops > starts) | (stops < last)
            trained |= (stops > first) & (stops <= last) & wide
        begin = row.spans[-1][0]
        answer = int(np.searchsorted(stops, begin, side="right"))
        made.append(_finish(ids, trained, answer, prefix, train_all))
    return made


def _encode_slowly(row: Rendered, tokenizer: Any, prefix: list[int], train_all: bool) -> Example:
    """For tokenizers without offsets: a place is where the encoded beginning parts from the whole.

    It may part a token early, where a merge crosses the place.
    """
    ids = tokenizer(row.text, add_special_tokens=False)["input_ids"]

    def count(end: int) -> int:
        begun = tokenizer(row.text[:end], add_special_tokens=False)["input_ids"]
        pairs = enumerate(zip(begun, ids, strict=False))
        return next((place for place, (a, b) in pairs if a != b), min(len(begun), len(ids)))

    trained = np.zeros(len(ids), dtype=bool)
    for first, last in row.spans:
        trained[count(first) : count(last)] = True
    return _finish(ids, trained, count(row.spans[-1][0]), prefix, train_all)


def _finish(
    ids: Sequence[int],
    trained: NDArray[np.bool_],
    answer: int,
    prefix: list[int],
    train_all: bool,
) -> Example:
    everything = np.array([*prefix, *ids], dtype=np.int32)
    targets = np.concatenate([np.zeros(len(prefix), dtype=bool), trained])
    if train_all:
        targets[:] = True
    start = answer + len(prefix)
    if start == len(prefix):
        # A plain text has no prompt; its beginning serves as one.
        start = min(len(everything) // 2, 32)
    return Example(everything, targets, max(1, start))


def cut(example: Example, max_length: int, has_prompt: bool) -> Example:
    """Shorten an example to `max_length`.

    First what stands behind the last target goes, then the prompt's oldest tokens, then the
    answer's end.
    """
    tail = int(np.argmax(example.trained[::-1])) if example.trained.any() else 0
    size = max(max_length, len(example.ids) - tail)
    example = replace(example, ids=example.ids[:size], trained=example.trained[:size])
    excess = len(example.ids) - max_length
    if excess <= 0:
        return example
    # The first token stays where it is: it is the beginning-of-sequence token where there is one.
    removable = example.answer_start - 2 if has_prompt else 0
    gone = max(0, min(excess, removable))
    keep = np.r_[0, 1 + gone : len(example.ids)][:max_length]
    return replace(
        example,
        ids=example.ids[keep],
        trained=example.trained[keep],
        answer_start=max(1, min(example.answer_start - gone, max_length - 1)),
    )


def _bos(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, where the tokenizer puts one before a plain text."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids and ids[0] == bos else []
