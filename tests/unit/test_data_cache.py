"""The cache: what is noticed, what is shared, how the validation share is drawn."""

import copy
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import DataConfig
from orchestrator.data import EncodedDataset, PreparedData, dataset, encoding, prepare
from orchestrator.data.batches import step_indices
from orchestrator.errors import DataError

WORDS = ["red", "green", "blue", "cat", "dog", "bird"]


def questions(*numbers: int) -> list[dict[str, str]]:
    return [{"question": f"{WORDS[n % 6]} {n}", "answer": WORDS[n % 5]} for n in numbers]


def load(tmp_path: Path, tokenizer: Any, rows: list[Any], **options: Any) -> PreparedData:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(**{"train": str(path), "validation": None, **options})
    return prepare(config, tokenizer, tmp_path / "cache")


def contents(data: EncodedDataset) -> list[bytes]:
    return [data[i].ids.tobytes() + data[i].trained.tobytes() for i in range(len(data))]


@pytest.mark.parametrize("name", ["ids", "trained", "ends", "targets", "answers", "hashes"])
def test_a_byte_that_changed_is_noticed(tmp_path: Path, tokenizer: Any, name: str) -> None:
    rows = questions(*range(6))
    data = load(tmp_path, tokenizer, rows)
    before = contents(data.train)
    damaged = data.train.folder / f"{name}.bin"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.unlink()
    damaged.write_bytes(content)
    again = load(tmp_path, tokenizer, rows)
    assert not again.sources[0].cached and contents(again.train) == before
    assert damaged.read_bytes() != content
    assert load(tmp_path, tokenizer, rows).sources[0].cached


def test_an_entry_is_read_once_until_a_file_changes(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = questions(*range(6))
    folder = load(tmp_path, tokenizer, rows).train.folder
    summed, read = [], dataset._sum

    def counted(path: Path) -> int:
        summed.append(path.stem)
        return read(path)

    monkeypatch.setattr(dataset, "_sum", counted)
    for _ in range(3):
        assert load(tmp_path, tokenizer, rows).sources[0].cached
    assert len(summed) == len(set(summed)) == 6
    # Of the same size, and not damaged: read again, and kept.
    content = (folder / "ids.bin").read_bytes()
    (folder / "ids.bin").write_bytes(content)
    assert load(tmp_path, tokenizer, rows).sources[0].cached and len(summed) == 12


def test_a_cache_that_can_only_be_read_serves(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = questions(*range(6))
    load(tmp_path, tokenizer, rows)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise PermissionError("read-only")

    monkeypatch.setattr(dataset, "NamedTemporaryFile", refuse)
    assert load(tmp_path, tokenizer, rows).sources[0].cached


@pytest.mark.parametrize("record", ["[]", "null", "{", '{"sums": {}, "counts": {"cows": 1}}'])
def test_a_record_that_is_none(tmp_path: Path, tokenizer: Any, record: str) -> None:
    data = load(tmp_path, tokenizer, questions(1))
    (data.train.folder / "record.json").write_text(record)
    assert not load(tmp_path, tokenizer, questions(1)).sources[0].cached


def test_what_a_killed_builder_left_is_cleared(tmp_path: Path, tokenizer: Any) -> None:
    data = load(tmp_path, tokenizer, questions(1))
    folder = data.train.folder
    left = folder.with_name(f".{folder.name}-killed")
    folder.rename(left)
    load(tmp_path, tokenizer, questions(1))
    assert not left.exists() and (folder / "record.json").is_file()


def test_one_builds_and_the_others_wait(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(*range(300))))
    config = DataConfig(train=str(path), validation=0.1)
    calls, encode = [], encoding.encode

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return encode(*arguments)

    monkeypatch.setattr(encoding, "encode", counted)
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(prepare, config, tokenizer, tmp_path / "c", tokenizer_digest="t")
            for _ in range(4)
        ]
        sets = [job.result() for job in jobs]
    assert len(calls) == 1
    assert len({tuple(contents(data.train)) for data in sets}) == 1


def test_the_same_bytes_under_another_suffix_are_other_rows(tmp_path: Path, tokenizer: Any) -> None:
    line = json.dumps(questions(1)[0]) + "\n"
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_text(line)
    first = DataConfig(train=str(tmp_path / "a.jsonl"), validation=None)
    prepare(first, tokenizer, tmp_path / "cache")
    with pytest.raises(DataError, match="is empty"):
        prepare(DataConfig(train=str(tmp_path / "a.csv")), tokenizer, tmp_path / "cache")


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = encoding.encode

    def touched(*arguments: Any) -> Any:
        os.utime(tmp_path / "rows.jsonl", (1, 1))
        return encode(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(encoding, "encode", touched)
        with pytest.raises(DataError, match="was changed while it was read"):
            load(tmp_path, tokenizer, questions(1))
    assert len(load(tmp_path, tokenizer, questions(1)).train) == 1


def test_a_tokenizer_that_was_saved_is_the_same(tmp_path: Path, tokenizer: Any) -> None:
    """The first run has the model's own, later ones that of the base store."""
    from transformers import AutoTokenizer

    template = "{% for m in messages %}{{ m['content'] }}\r\n{% endfor %}"
    for number, chosen in enumerate((template, {"default": template})):
        own = copy.deepcopy(tokenizer)
        own.chat_template = chosen
        own.save_pretrained(tmp_path / f"saved{number}")
        kept = AutoTokenizer.from_pretrained(tmp_path / f"saved{number}")
        found = [load(tmp_path, each, questions(1, 2)).digest for each in (own, kept)]
        assert found[0] == found[1]


def test_a_model_of_short_rows_bounds_the_datas(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "red " * 90, "answer": "cat"}) + "\n")
    config = DataConfig(train=str(path), validation=None)
    data = prepare(config, tokenizer, tmp_path / "cache", 32)
    assert len(data.train[0].ids) == 32 and data.counts.cut == 1


def test_a_cache_folder_that_is_none(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache folder .* cannot be used"):
        load(tmp_path, tokenizer, questions(1))


def test_a_known_identity_spares_asking_the_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(questions(1)[0]) + "\n")
    config = DataConfig(train=str(path), validation=None)
    digests = [
        prepare(config, tokenizer, tmp_path / "cache", tokenizer_digest=name).digest
        for name in ("a", "a", "b")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_the_summary_says_what_was_chosen_and_why(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"Q": "red", "answer": "cat"}]
    made = load(tmp_path, tokenizer, rows, columns={"question": "Q"})
    assert "format question_answer (detected by: Q, answer)" in made.summary()
    assert made.columns == {"question": "Q", "answer": "answer"} and "cache" not in made.summary()
    assert "from the cache" in load(tmp_path, tokenizer, rows, columns={"question": "Q"}).summary()
    named = load(tmp_path, tokenizer, questions(1), format="question_answer")
    assert named.format == "question_answer" and "detected" not in named.summary()


@pytest.mark.parametrize(("rows", "share", "held"), [(2, 0.9, 1), (2, 0.1, 1), (9, 0.99, 8)])
def test_small_sets_keep_a_row_on_each_side(
    tmp_path: Path, tokenizer: Any, rows: int, share: float, held: int
) -> None:
    data = load(tmp_path, tokenizer, questions(*range(rows)), validation=share)
    assert data.validation is not None
    assert (len(data.validation), len(data.train)) == (held, rows - held)


def test_a_crowd_of_equal_rows_is_not_held_out_for_a_small_share(
    tmp_path: Path, tokenizer: Any
) -> None:
    for other in range(1, 9):
        rows = questions(*[0] * 30, other, 10 + other)
        data = load(tmp_path, tokenizer, rows, validation=0.05)
        assert data.validation is not None and len(data.validation) == 2


def test_equal_rows_alone_cannot_be_split(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="equal examples stay together"):
        load(tmp_path, tokenizer, questions(1, 1, 1, 1), validation=0.25)


def test_parts_travel_as_paths(tmp_path: Path, tokenizer: Any) -> None:
    data = load(tmp_path, tokenizer, questions(*range(400)), validation=0.1)
    assert data.validation is not None and len(data.validation) == 40
    for part in (data.train, data.validation):
        travelled = pickle.dumps(part)
        # 360 places of 8 bytes would not fit.
        assert len(travelled) < 1000
        again: EncodedDataset = pickle.loads(travelled)
        assert contents(again) == contents(part)
        assert again.target_counts.tolist() == [
            int(part[i].trained[1:].sum()) for i in range(len(part))
        ]
    few = data.train.subset(np.array([3, 1]))
    assert contents(pickle.loads(pickle.dumps(few))) == [contents(data.train)[i] for i in (3, 1)]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 3), st.integers(1, 30))
def test_a_step_cannot_be_changed_by_who_gets_it(
    examples: int, batch: int, seed: int, step: int
) -> None:
    first = step_indices(examples, batch, seed, step)
    kept = first.tolist()
    first[:] = 0
    assert step_indices(examples, batch, seed, step).tolist() == kept and first.dtype == np.int64
