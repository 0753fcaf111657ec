"""The journal: whole lines only, each step once, no secrets."""

import json
import threading
from pathlib import Path

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.tracking import observer
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.journal import Journal, read_events


def names(path: Path) -> list[str]:
    return [event["event"] for event, _ in read_events(path)]


def test_the_wish_to_stop_is_a_file(tmp_path: Path) -> None:
    assert not observer.StopOnly(tmp_path).stop_requested()
    observer.stop_path(tmp_path).touch()
    assert observer.StopOnly(tmp_path).stop_requested()


def test_events_come_back_with_offsets_to_go_on_from(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    with Journal(path) as journal:
        assert journal.append("step", step=1, loss=2.5)
        assert journal.append("step", step=2, loss=float("nan"))
    (first, offset), (second, end) = read_events(path)
    assert first["loss"] == 2.5 and first["time"] > 0 and second["step"] == 2
    assert [event["step"] for event, _ in read_events(path, offset)] == [2]
    assert end == path.stat().st_size and list(read_events(path, end)) == []


def test_each_step_evaluation_and_sample_stands_there_once(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    once = [
        ("step", {"step": 3}),
        ("evaluation", {"step": 3}),
        ("sample", {"when": "before", "step": 0, "index": 0}),
        ("sample", {"when": "before", "step": 0, "index": 1}),
        ("sample", {"when": "after", "step": 3, "index": 0}),
        ("sample", {"when": "after", "step": 9, "index": 0}),
    ]
    with Journal(path) as journal:
        assert all(journal.append(event, **fields) for event, fields in once)
        assert not any(journal.append(event, **fields) for event, fields in once)
    with Journal(path) as again:
        assert again.last_step == 3
        assert not any(again.append(event, **fields) for event, fields in once)
        assert again.append("step", step=4) and again.last_step == 4
        assert again.append("warning", message="a") and again.append("warning", message="a")
    assert len(names(path)) == len(once) + 3


@pytest.mark.parametrize("torn", ['{"event": "step", "st', '{"event": "step", "step": 9}', "\0\0"])
def test_a_torn_last_line_is_not_read_and_is_cut_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("step", step=8)
    with path.open("a") as stream:
        stream.write(torn)
    assert names(path) == ["step"]
    with Journal(path) as journal:
        assert journal.last_step == 8
        assert journal.append("step", step=9)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [8, 9]


def test_a_spoilt_line_in_the_middle_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "step", "step": 1}\nspoilt\n{"event": "step", "step": 2}\n')
    assert [event["step"] for event, _ in read_events(path)] == [1, 2]
    with Journal(path) as journal:
        assert not journal.append("step", step=2)


def test_threads_may_share_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        threads = [
            threading.Thread(target=lambda: [journal.append("step", step=s) for s in range(200)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(event["step"] for event, _ in read_events(path)) == list(range(200))


def test_a_full_disk_raises_and_leaves_no_torn_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("step", step=1)
        whole = __import__("os").write
        with monkeypatch.context() as patched:
            patched.setattr("os.write", lambda fd, line: whole(fd, line[:5]))
            with pytest.raises(OSError, match="disk full"):
                journal.append("step", step=2)
        assert journal.append("step", step=2)
    assert [event["step"] for event, _ in read_events(path)] == [1, 2]


def test_secrets_stay_out_but_our_own_words_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", "finished")
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("finish", status="finished", error={"deep": ["it has finished"]})
    ((event, _),) = read_events(path)
    assert event["status"] == "finished" and event["error"] == {"deep": ["it has ***"]}


def test_cursor_keeps_its_key_and_starts_again_for_another_store(tmp_path: Path) -> None:
    assert Cursor.peek(tmp_path) is None and not list(tmp_path.iterdir())
    cursor = Cursor.load(tmp_path)
    assert Cursor.load(tmp_path) == cursor
    assert {p.name for p in tmp_path.iterdir()} == {".delivery.json", ".run_key"}
    moved = Cursor(cursor.run_key, "a", "id", 40, {"adapter": "x"}, "3")
    moved.save(tmp_path)
    assert Cursor.load(tmp_path) == moved
    assert moved.over("a", 40) == moved
    assert moved.over("b", 40) == Cursor(cursor.run_key, "b")
    assert moved.over("a", 39) == Cursor(cursor.run_key, "a")


def test_a_damaged_or_lost_cursor_starts_again_with_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / ".delivery.json"
    key = Cursor.load(tmp_path).run_key
    for damage in ("", "{", "[]", "\0\0"):
        path.write_text(damage)
        assert Cursor.load(tmp_path) == Cursor(key) == Cursor.load(tmp_path)
    path.unlink()
    assert Cursor.load(tmp_path) == Cursor(key)


def test_a_cursor_that_the_disk_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / ".delivery.json").mkdir()
    with pytest.raises(OrchestratorError, match=r"\.delivery\.json"):
        Cursor.load(tmp_path)
