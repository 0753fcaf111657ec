"""Rows to examples: formats, targets, cuts, bad rows, the split and the cache."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.config import DataConfig
from orchestrator.data import EncodedDataset, PreparedData, prepare
from orchestrator.errors import DataError

CHAT = [
    {"role": "system", "content": "one two"},
    {"role": "user", "content": "red cat"},
    {"role": "assistant", "content": "blue dog"},
    {"role": "user", "content": "green"},
    {"role": "assistant", "content": "bird bird"},
]


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def _prepare(tmp_path: Path, tokenizer: Any, rows: list[Any], **settings: Any) -> PreparedData:
    path = _write(tmp_path / "rows.jsonl", rows)
    config = DataConfig(**{"train": str(path), "validation": None, **settings})
    return prepare(config, tokenizer, tmp_path / "cache")


def _trained(tokenizer: Any, data: EncodedDataset, index: int = 0) -> str:
    example = data[index]
    return tokenizer.decode(example.ids[example.trained])


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": CHAT[1:3]}),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "red cat"},
                    {"from": "gpt", "value": "blue dog"},
                ]
            },
        ),
        ("prompt_completion", {"prompt": "red cat", "completion": "blue dog"}),
        ("prompt_completion", {"prompt": CHAT[1:2], "completion": CHAT[2:3]}),
        ("alpaca", {"instruction": "red cat", "input": "", "output": "blue dog"}),
        ("question_answer", {"question": "red cat", "answer": "blue dog"}),
    ],
)
def test_formats_are_detected_and_mean_the_same(
    tmp_path: Path, tokenizer: Any, name: str, row: dict[str, Any]
) -> None:
    data = _prepare(tmp_path, tokenizer, [row])
    assert data.sources[0].format == name and name in data.summary()
    text = tokenizer.decode(data.train[0].ids)
    assert text == (
        "<|im_start|>user\nred cat<|im_end|>\n<|im_start|>assistant\nblue dog<|im_end|>\n"
    )
    assert _trained(tokenizer, data.train) == "blue dog<|im_end|>"
    prompt = tokenizer.decode(data.train[0].ids[: data.train[0].answer_start])
    assert prompt == "<|im_start|>user\nred cat<|im_end|>\n<|im_start|>assistant\n"


def test_every_assistant_turn_is_trained_as_the_templates_own_mask_says(
    tmp_path: Path, tokenizer: Any
) -> None:
    data = _prepare(tmp_path, tokenizer, [{"messages": CHAT}])
    assert _trained(tokenizer, data.train) == "blue dog<|im_end|>bird bird<|im_end|>"
    marked = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    )
    own = tokenizer.apply_chat_template(
        CHAT, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
    )
    assert data.train[0].ids.tolist() == own["input_ids"]
    assert data.train[0].trained.astype(int).tolist() == own["assistant_masks"]


def test_train_on_all(tmp_path: Path, tokenizer: Any) -> None:
    data = _prepare(tmp_path, tokenizer, [{"messages": CHAT}], train_on="all")
    assert data.train[0].trained.all()
    assert data.train.target_counts.tolist() == [len(data.train[0].ids) - 1]


def test_text_ends_with_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    data = _prepare(tmp_path, tokenizer, [{"text": "red cat blue dog"}])
    assert tokenizer.decode(data.train[0].ids) == "red cat blue dog<|endoftext|>"
    assert data.train[0].trained.all() and data.sources[0].format == "text"


def test_plain_template_where_the_model_has_none(tmp_path: Path, tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    data = _prepare(tmp_path, bare, [{"messages": CHAT[1:3]}])
    text = bare.decode(data.train[0].ids)
    assert text == "### User:\nred cat\n\n### Assistant:\nblue dog<|endoftext|>"
    assert _trained(bare, data.train) == "blue dog<|endoftext|>"
    assert "plain template" in data.summary()


def test_template_without_system_role_gets_it_in_the_first_turn(
    tmp_path: Path, tokenizer: Any
) -> None:
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    data = _prepare(tmp_path, strict, [{"messages": CHAT[:3]}])
    assert "user\none two\n\nred cat<|im_end|>" in strict.decode(data.train[0].ids)
    assert _trained(strict, data.train) == "blue dog<|im_end|>"


def test_template_that_rewrites_earlier_turns(tmp_path: Path, tokenizer: Any) -> None:
    """Reasoning models put a block before the last answer only."""
    import copy

    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}ten ten {% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    data = _prepare(tmp_path, thinking, [{"messages": CHAT}])
    assert _trained(thinking, data.train) == "blue dog<|im_end|>ten ten bird bird<|im_end|>"


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_long_examples(tmp_path: Path, tokenizer: Any, too_long: str) -> None:
    rows = [
        {"question": "red " * 200, "answer": "blue dog"},
        {"question": "cat", "answer": "one two"},
    ]
    data = _prepare(tmp_path, tokenizer, rows, max_length=40, too_long=too_long)
    counts = data.sources[0].counts
    if too_long == "drop":
        assert (counts.dropped, counts.examples, len(data.train)) == (1, 1, 1)
        assert "1 dropped" in data.summary()
        return
    assert (counts.cut, counts.examples) == (1, 2) and "1 cut" in data.summary()
    assert len(data.train[0].ids) == 40
    assert _trained(tokenizer, data.train) == "blue dog<|im_end|>"
    prompt = tokenizer.decode(data.train[0].ids[: data.train[0].answer_start])
    assert prompt.endswith("<|im_start|>assistant\n")


def test_an_answer_longer_than_all_keeps_its_beginning(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": "cat", "answer": "one two three four five " * 30}]
    data = _prepare(tmp_path, tokenizer, rows, max_length=24)
    example = data.train[0]
    assert len(example.ids) == 24 and example.trained[-1]
    assert tokenizer.decode(example.ids[example.trained]).startswith("one two")


BAD_ROWS = [
    ("{nonsense", "not JSON"),
    ('"text"', "object"),
    ('{"question": "a"}', "answer is missing"),
    ('{"question": "a", "answer": ""}', "answer is empty"),
    ('{"question": "a", "answer": 3}', "int"),
]


def test_bad_rows_are_named_with_file_line_and_reason(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    good = '{"question": "red", "answer": "cat"}'
    path.write_text("\n".join([good, *(line for line, _ in BAD_ROWS)]) + "\n")
    config = DataConfig(train=str(path), validation=None)
    with pytest.raises(DataError) as caught:
        prepare(config, tokenizer, tmp_path / "cache")
    for number, (_, reason) in enumerate(BAD_ROWS, 2):
        line = next(x for x in str(caught.value).splitlines() if f"rows.jsonl:{number}:" in x)
        assert reason in line
    skipping = config.model_copy(update={"on_bad_row": "skip"})
    data = prepare(skipping, tokenizer, tmp_path / "cache")
    assert data.sources[0].counts.bad == len(BAD_ROWS) and len(data.train) == 1
    assert f"{len(BAD_ROWS)} bad rows skipped" in data.summary()


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n{"question": "\xff", "answer": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not UTF-8"):
        prepare(DataConfig(train=str(path), validation=None), tokenizer, tmp_path / "cache")


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([], {}, "columns"),
        ([{"a": 1}], {}, "fit no format"),
        ([{"question": "a", "answer": "b"}], {"max_length": 2, "too_long": "drop"}, "longer than"),
        ([{"question": "a"}], {"format": "question_answer", "on_bad_row": "skip"}, "were bad"),
        ([{"question": "a", "answer": "b"}], {"validation": 0.5}, "none to train on"),
        ([{"question": "a", "answer": "b"}], {"columns": {"qestion": "q"}}, "qestion"),
        ([{"messages": CHAT[:2]}], {}, "no assistant turn"),
        ([{"messages": [{"role": "wizard", "content": "x"}]}], {}, "wizard"),
    ],
)
def test_sets_that_are_refused(
    tmp_path: Path, tokenizer: Any, rows: list[Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        _prepare(tmp_path, tokenizer, rows, **settings)


def test_columns_are_mapped(tmp_path: Path, tokenizer: Any) -> None:
    columns = {"question": "Q", "answer": "A"}
    data = _prepare(tmp_path, tokenizer, [{"Q": "red", "A": "cat"}], columns=columns)
    assert data.sources[0].format == "question_answer"
    assert _trained(tokenizer, data.train) == "cat<|im_end|>"


def test_every_kind_of_file_holds_the_same(tmp_path: Path, tokenizer: Any) -> None:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"question": f"red {n}", "answer": f'cat, "{n}"\nbird'} for n in range(5)]
    folder = tmp_path / "files"
    folder.mkdir()
    _write(folder / "a.jsonl", rows)
    (folder / "b.json").write_text(json.dumps(rows))
    with (folder / "c.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    (folder / ".hidden.jsonl").write_text("nonsense\n")
    (folder / "notes.md").write_text("nonsense\n")
    config = DataConfig(train=str(folder), validation=None)
    data = prepare(config, tokenizer, tmp_path / "cache")
    assert len(data.train) == 20
    ids = [data.train[i].ids.tolist() for i in range(20)]
    assert ids[:5] == ids[5:10] == ids[10:15] == ids[15:]


def test_saved_data_sets_are_read(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    rows = [{"question": "red", "answer": "cat"}, {"question": "blue", "answer": "dog"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    config = DataConfig(train=str(tmp_path / "saved"), validation=None)
    data = prepare(config, tokenizer, tmp_path / "cache")
    assert [_trained(tokenizer, data.train, i) for i in (0, 1)] == [
        "cat<|im_end|>",
        "dog<|im_end|>",
    ]


def test_missing_files_are_named(tmp_path: Path, tokenizer: Any) -> None:
    _write(tmp_path / "train.jsonl", [])
    config = DataConfig(train=str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl"):
        prepare(config, tokenizer, tmp_path / "cache")


def test_split_hangs_on_content_alone(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": f"red {n % 40}", "answer": "cat"} for n in range(60)]

    def held_out(order: list[Any]) -> set[bytes]:
        data = _prepare(tmp_path, tokenizer, order, validation=0.2)
        assert data.validation is not None
        train = {data.train[i].ids.tobytes() for i in range(len(data.train))}
        validation = {data.validation[i].ids.tobytes() for i in range(len(data.validation))}
        # Equal rows stay together: nothing that is trained on is held out.
        assert not train & validation
        assert 12 <= len(data.validation) <= 14
        return validation

    assert held_out(rows) == held_out(rows[::-1])


def test_validation_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    other = _write(tmp_path / "held.jsonl", [{"question": "one", "answer": "two"}])
    rows = [{"question": "red", "answer": "cat"}]
    data = _prepare(tmp_path, tokenizer, rows, validation=str(other))
    assert data.validation is not None and len(data.validation) == len(data.train) == 1
    assert _trained(tokenizer, data.validation) == "two<|im_end|>"


def test_cache_is_used_checked_and_keyed_by_content(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": "red", "answer": "cat"}, {"question": "blue", "answer": "dog"}]
    first = _prepare(tmp_path, tokenizer, rows)
    ids = first.train[1].ids.tolist()
    with monkeypatch.context() as patched:
        patched.setattr("orchestrator.data.encoding.encode", None)
        again = _prepare(tmp_path, tokenizer, rows)
        assert again.train[1].ids.tolist() == ids and again.digest == first.digest
    damaged = first.train.folder / "ids.bin"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert _prepare(tmp_path, tokenizer, rows).train[1].ids.tolist() == ids
    assert _prepare(tmp_path, tokenizer, rows, train_on="all").digest != first.digest
    assert _prepare(tmp_path, tokenizer, rows[:1]).digest != first.digest


def test_examples_are_mapped_not_copied(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": f"red {n}", "answer": "cat"} for n in range(30)]
    data = _prepare(tmp_path, tokenizer, rows, validation=0.1).train
    again: EncodedDataset = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 2000
    assert isinstance(data[0].ids.base, np.memmap)
    assert [again[i].ids.tolist() for i in range(27)] == [data[i].ids.tolist() for i in range(27)]
    assert data.lengths.tolist() == [len(data[i].ids) for i in range(len(data))]
