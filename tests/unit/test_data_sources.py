"""Files that are damaged or oddly made: each fault names its place, nothing crashes or is lost."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import DataConfig
from orchestrator.data import PreparedData, prepare
from orchestrator.errors import DataError

GOOD = {"question": "red", "answer": "cat"}


def load(tmp_path: Path, tokenizer: Any, name: str, content: Any, **options: Any) -> PreparedData:
    path = tmp_path / name
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    config = DataConfig(**{"train": str(path), "validation": None, **options})
    return prepare(config, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": ' + "1" * 5000 + "}", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (r'{"question": "red", "answer": "\ud800"}', "not UTF-8"),
        # One row of another kind does not decide the format of all.
        ('{"messages": [{"role": "user", "content": "x"}]}', "question is missing"),
    ],
)
def test_lines_that_no_parser_or_tokenizer_takes(
    tmp_path: Path, tokenizer: Any, line: str, reason: str
) -> None:
    content = json.dumps(GOOD) + "\n" + line + "\n" + json.dumps(GOOD) + "\n"
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{reason}"):
        load(tmp_path, tokenizer, "rows.jsonl", content)
    data = load(tmp_path, tokenizer, "rows.jsonl", content, on_bad_row="skip")
    assert (data.counts.rows, data.counts.bad, len(data.train)) == (3, 1, 2)


def test_a_role_that_is_no_text(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": [{"role": ["user"], "content": "x"}]}]
    with pytest.raises(DataError, match=r":1: message 1 has role \['user'\]"):
        load(tmp_path, tokenizer, "rows.jsonl", rows)


def test_all_bad_rows_are_counted_and_the_first_shown(tmp_path: Path, tokenizer: Any) -> None:
    rows = [GOOD, *[{"question": "red"}] * 700, GOOD]
    with pytest.raises(DataError, match="700 of 702 rows") as caught:
        load(tmp_path, tokenizer, "rows.jsonl", rows)
    assert str(caught.value).count("rows.jsonl:") == 5


def test_a_column_is_named_as_the_data_has_it(tmp_path: Path, tokenizer: Any) -> None:
    options = {"format": "question_answer", "columns": {"answer": "A"}}
    with pytest.raises(DataError, match=":1: column A is missing"):
        load(tmp_path, tokenizer, "rows.jsonl", [GOOD], **options)


def test_an_input_of_alpaca_that_is_no_text(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [{"instruction": "red", "input": None, "output": "cat"}]
    assert len(load(tmp_path, tokenizer, "rows.jsonl", rows).train) == 1
    with pytest.raises(DataError, match=":1: column input holds int"):
        load(tmp_path, tokenizer, "rows.jsonl", [{**rows[0], "input": 3}])


@pytest.mark.parametrize(
    ("content", "words"), [("", "is empty"), ("{a\n{b\n", "none of the first 2 rows can be read")]
)
def test_files_without_one_row(tmp_path: Path, tokenizer: Any, content: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load(tmp_path, tokenizer, "rows.jsonl", content)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"\xff,b", "not UTF-8"),
        (b'"a"b,c', "not CSV"),
        (b"a,b,c", "3 fields, the header 2"),
        (b"a", "1 fields, the header 2"),
    ],
)
def test_a_bad_record_of_a_csv_file_is_bad_alone(
    tmp_path: Path, tokenizer: Any, record: bytes, reason: str
) -> None:
    content = b'question,answer\n"two\nlines",cat\n' + record + b"\nblue,dog\n"
    with pytest.raises(DataError, match=rf"rows\.csv:4: .*{reason}"):
        load(tmp_path, tokenizer, "rows.csv", content)
    data = load(tmp_path, tokenizer, "rows.csv", content, on_bad_row="skip")
    assert (len(data.train), data.counts.bad) == (2, 1)


def test_a_quote_that_never_ends_does_not_swallow_the_file(tmp_path: Path, tokenizer: Any) -> None:
    content = 'question,answer\nred,cat\nblue,"dog\none,two\n'
    with pytest.raises(DataError, match=r"rows\.csv:3: .*unexpected end"):
        load(tmp_path, tokenizer, "rows.csv", content)


@pytest.mark.parametrize(
    "content",
    [[GOOD, GOOD], {"data": [GOOD, GOOD]}, {"version": 1, "rows": [GOOD, GOOD]}],
)
def test_json_may_wrap_its_rows(tmp_path: Path, tokenizer: Any, content: Any) -> None:
    assert len(load(tmp_path, tokenizer, "rows.json", json.dumps(content)).train) == 2


def test_json_may_be_one_row(tmp_path: Path, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "cat"}]
    data = load(tmp_path, tokenizer, "rows.json", json.dumps({"messages": turns}))
    assert (data.format, len(data.train)) == ("messages", 1)


@pytest.mark.parametrize("lists", [{"tags": ["x", "y"]}, {"tags": [{"name": "x"}]}])
def test_lists_in_a_row_are_not_its_rows(
    tmp_path: Path, tokenizer: Any, lists: dict[str, Any]
) -> None:
    data = load(tmp_path, tokenizer, "rows.json", json.dumps({**GOOD, **lists}))
    assert data.counts.rows == 1


@pytest.mark.parametrize(
    ("content", "rows", "bad"),
    [
        ({"text": "about this set", "data": [GOOD, GOOD]}, 2, 0),
        ({"data": [GOOD, None, GOOD]}, 3, 1),
        ({"data": [GOOD], "tags": ["x"]}, 1, 0),
    ],
)
def test_a_list_of_objects_is_what_is_wrapped(
    tmp_path: Path, tokenizer: Any, content: Any, rows: int, bad: int
) -> None:
    data = load(tmp_path, tokenizer, "rows.json", json.dumps(content), on_bad_row="skip")
    assert (data.counts.rows, data.counts.bad) == (rows, bad)


def test_what_describes_a_folder_is_no_row_of_it(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps(GOOD) + "\n")
    (folder / "dataset_info.json").write_text('{"alpaca": {"file_name": "rows.jsonl"}}')
    config = DataConfig(train=str(folder), validation=None)
    assert prepare(config, tokenizer, tmp_path / "cache").counts.rows == 1


CALL = {"role": "assistant", "content": "red", "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "x"}, CALL]}, "message 2 has tool_calls"),
        ({"messages": [{**CALL, "tool_calls": None}], "tools": [{"name": "f"}]}, "column tools"),
        (
            {"messages": [{**CALL, "tool_calls": None, "weight": 0.5}]},
            "message 1 has the weight 0.5",
        ),
        ({"instruction": "a", "output": "b", "history": ["a"]}, "column history is no list"),
        ({"instruction": "a", "output": "b", "system": 5}, "column system holds int"),
    ],
)
def test_what_would_be_lost_makes_a_bad_row(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=f"jsonl:1: {reason}"):
        load(tmp_path, tokenizer, "rows.jsonl", [row])


def test_system_and_history_have_columns_of_their_own(tmp_path: Path, tokenizer: Any) -> None:
    turns = [("system", "one"), ("user", "red"), ("assistant", "cat"), ("user", "a\n\nb")]
    turns += [("assistant", "dog")]
    messages = [{"role": role, "content": content} for role, content in turns]
    spoken = [{"from": role, "value": content} for role, content in turns[1:]]
    same = [
        {"messages": messages, "tools": "[]"},
        {"conversations": spoken, "system": "one"},
        {"instruction": "a", "input": "b", "output": "dog", "system": "one"}
        | {"history": [["red", "cat"]]},
        {"instruction": "a", "input": "b", "output": "dog", "system": "one"}
        | {"history": '[["red", "cat"]]'},
    ]
    found = []
    for number, row in enumerate(same):
        example = load(tmp_path, tokenizer, f"{number}.jsonl", [row]).train[0]
        found.append((example.ids.tolist(), example.trained.tolist()))
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize(
    "more",
    [
        {"system": " ", "history": ""},
        {"system": None, "history": "[]"},
        {"history": []},
        {"input": ""},
    ],
)
def test_empty_columns_are_none(tmp_path: Path, tokenizer: Any, more: dict[str, Any]) -> None:
    row = {"instruction": "a", "output": "b"}
    plain = load(tmp_path, tokenizer, "plain.jsonl", [row]).train[0].ids.tolist()
    assert load(tmp_path, tokenizer, "more.jsonl", [row | more]).train[0].ids.tolist() == plain
    called = {"name": None, "arguments": None}
    messages = [
        {"role": "user", "content": "a", "weight": float("nan")},
        {"role": "assistant", "content": "b", "tool_calls": "[]", "function_call": called},
    ]
    asked = load(tmp_path, tokenizer, "asked.jsonl", [{"messages": messages, "tools": "null"}])
    assert asked.train[0].ids.tolist() == plain


def test_folders_named_like_files_and_capital_suffixes(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "set" / "old.json").mkdir(parents=True)
    for place in ("a.JSONL", "old.json/b.jsonl"):
        (tmp_path / "set" / place).write_text(json.dumps(GOOD) + "\n")
    config = DataConfig(train=str(tmp_path / "set"), validation=None)
    assert len(prepare(config, tokenizer, tmp_path / "cache").train) == 2


def test_a_saved_set_with_splits_asks_for_one(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    rows = datasets.Dataset.from_list([GOOD])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    config = DataConfig(train=str(tmp_path / "saved"), validation=None)
    with pytest.raises(DataError, match=r"holds splits; .*saved/train, .*saved/test"):
        prepare(config, tokenizer, tmp_path / "cache")
    one = config.model_copy(update={"train": str(tmp_path / "saved" / "train")})
    assert len(prepare(one, tokenizer, tmp_path / "cache").train) == 1
    listed = config.model_copy(update={"train": (one.train, one.train)})
    with pytest.raises(DataError, match="not in a list"):
        prepare(listed, tokenizer, tmp_path / "cache")


def test_a_hub_id_that_cannot_be_reached(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").mkdir()
    config = DataConfig(train="data/trian", validation=None)
    with pytest.raises(DataError, match=r"no path here; did you mean data/train\?") as caught:
        prepare(config, tokenizer, tmp_path / "cache")
    assert "no route to host" in str(caught.value) and "local file" in str(caught.value)
    assert "much more" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "config", "split"),
    [
        ("owner/rows", None, "train"),
        ("owner/rows:test", None, "test"),
        ("owner/rows:main:test", "main", "test"),
        ("owner/rows:main:", "main", "train"),
        ("owner/rows:train[:50%]", None, "train[:50%]"),
        ("owner/rows:main:train[:50%]", "main", "train[:50%]"),
    ],
)
def test_a_hub_id_names_its_split_and_its_configuration(
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    config: str | None,
    split: str,
) -> None:
    import datasets

    asked = []

    def load(repository: str, name: str | None, *, split: str) -> Any:
        asked.append((repository, name, split))
        return datasets.Dataset.from_list([GOOD, {"question": "blue", "answer": "dog"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = prepare(DataConfig(train=source, validation=None), tokenizer, tmp_path / "cache")
    assert asked == [("owner/rows", config, split)]
    assert (data.format, len(data.train)) == ("question_answer", 2)
    assert data.summary().startswith(f"Data {source}: ")


def test_a_data_set_with_several_configurations_wants_one_named(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As openai/gsm8k is laid out, from a folder instead of the hub."""
    import datasets

    real, folder, about = datasets.load_dataset, tmp_path / "rows", ["---", "configs:"]
    for name in ("main", "socratic"):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text(json.dumps({**GOOD, "answer": name}) + "\n")
        about += [f"- config_name: {name}", f"  data_files: {name}/train.jsonl"]
    (folder / "README.md").write_text("\n".join([*about, "---", ""]))

    def load(repository: str, *arguments: Any, **options: Any) -> Any:
        return real(str(folder), *arguments, **options, cache_dir=str(tmp_path / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = DataConfig(train="owner/rows:socratic:train", validation=None)
    data = prepare(config, tokenizer, tmp_path / "cache")
    assert "socratic" in tokenizer.decode(data.train[0].ids)
    unnamed = config.model_copy(update={"train": "owner/rows:train"})
    with pytest.raises(DataError, match=r"Config name is missing.*owner/name:config:split"):
        prepare(unnamed, tokenizer, tmp_path / "cache")


def test_the_memory_that_reading_takes_does_not_grow_with_the_file(
    tmp_path: Path, tokenizer: Any
) -> None:
    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        path.write_text((json.dumps({"text": "red cat " * 20}) + "\n") * rows)
        config = DataConfig(train=str(path), validation=None)
        tracemalloc.start()
        try:
            assert len(prepare(config, tokenizer, tmp_path / "cache").train) == rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    assert peak(4_200) < 1.2 * peak(600)
