"""The journal, the secrets, the champion: without MLflow."""

import json
import math
from pathlib import Path

import pytest

from orchestrator.jobfile import job_from_mapping
from orchestrator.tracking.champion import Decision, Version, decide
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.delivery import deliver_pending
from orchestrator.tracking.journal import Journal, read_events
from orchestrator.tracking.secrets import redact
from orchestrator.tracking.system import SystemSampler


def _events(path: Path) -> list[dict]:
    return [event for event, _ in read_events(path)]


def test_each_step_stands_there_once(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    assert journal.append("step", step=1, loss=2.0)
    assert not journal.append("step", step=1, loss=2.0)
    journal.close()
    again = Journal(path)
    assert not again.append("step", step=1, loss=2.0)
    assert again.append("step", step=2, loss=1.0)
    assert again.append("evaluation", step=1, eval_loss=3.0)
    assert again.append("sample", when="before", index=0)
    assert again.append("sample", when="after", index=0)
    assert not again.append("sample", when="after", index=0)
    assert again.append("warning", message="a") and again.append("warning", message="a")
    assert [e["step"] for e in _events(path) if e["event"] == "step"] == [1, 2]
    assert all("time" in event for event in _events(path))


@pytest.mark.parametrize("tail", [b'{"event": "st', b'{"event": "step", "step": 2}', b"\xff"])
def test_torn_last_line_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path)
    first.append("step", step=1)
    first.close()
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert [event["step"] for event in _events(path)] == [1]
    again = Journal(path)
    assert path.read_bytes() == whole
    assert again.append("step", step=2)
    assert [event["step"] for event in _events(path)] == [1, 2]


def test_reading_goes_on_from_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for step in range(5):
        journal.append("step", step=step)
    pairs = list(read_events(path))
    assert [e["step"] for e, _ in read_events(path, pairs[2][1])] == [3, 4]
    assert pairs[-1][1] == path.stat().st_size


def test_numbers_that_are_not_finite_survive(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("step", step=1, loss=math.nan)
    assert math.isnan(_events(tmp_path / "journal.jsonl")[0]["loss"])


SECRETS = [
    ("postgresql://user:pa55word@host/db", "pa55word"),
    ("https://host/path?token=abcdef123&x=1", "abcdef123"),
    ("see hf_ABCDEFGHIJKLMNOPQRSTUV now", "hf_ABCDEFGHIJKLMNOPQRSTUV"),
    ("key AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    ("the value is swordfish99", "swordfish99"),
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_secrets_are_hidden(text: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "swordfish99")
    assert secret not in redact(text) and "***" in redact(text)


def test_secrets_do_not_reach_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", redact)
    journal.append("start", base={"name": ["s3://me:hunter22@bucket"]}, note=SECRETS[2][0])
    text = (tmp_path / "journal.jsonl").read_text()
    assert "hunter22" not in text and "hf_ABC" not in text


def test_a_variable_that_goes_away_meanwhile_disturbs_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Vanishing(dict):
        def __getitem__(self, name: str) -> str:
            raise KeyError(name)

        def get(self, name: str, default: str) -> str:
            return default

    monkeypatch.setattr("orchestrator.tracking.secrets.os.environ", Vanishing(MY_TOKEN="x" * 9))
    assert redact("step 3") == "step 3"


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("MAX_TOKENS", "4096")
    text = "false 4096 https://host:5000/path?step=3 sqlite:////tmp/mlflow.db"
    assert redact(text) == text


@pytest.mark.parametrize(
    ("new", "present", "wins"),
    [
        (1.0, 2.0, True),
        (2.0, 2.0, False),
        (3.0, 2.0, False),
        (1.0, None, True),
        (None, 2.0, False),
        (None, None, False),
        (math.nan, 2.0, False),
        (1.0, math.nan, True),
    ],
)
def test_champion(new: float | None, present: float | None, wins: bool) -> None:
    decision = decide(Version("2", new), Version("1", present))
    assert decision is (Decision.PROMOTE if wins else Decision.KEEP)


def test_the_first_version_is_champion_and_stays_its_own() -> None:
    assert decide(Version("1", None), None) is Decision.PROMOTE
    assert decide(Version("1", 1.0), Version("1", 2.0)) is Decision.KEEP


def test_cursor_keeps_its_key(tmp_path: Path) -> None:
    first = Cursor.load(tmp_path)
    assert Cursor.load(tmp_path) == first
    first.moved(7).save(tmp_path)
    assert Cursor.load(tmp_path).offset == 7
    (tmp_path / ".delivery.json").write_text("{torn")
    assert Cursor.load(tmp_path).offset == 0


def test_another_users_run_beside_disturbs_nobody(tmp_path: Path) -> None:
    """Its journal is not delivered yet, and its lock cannot be taken, not even by root."""
    with Journal(tmp_path / "theirs" / "journal.jsonl") as journal:
        journal.append("start")
    (tmp_path / "theirs" / ".lock").mkdir()
    job = job_from_mapping({"name": "own", "model": {"base": "b"}, "data": {"train": "t.jsonl"}})
    said: list[str] = []
    deliver_pending(job, tmp_path / "own", said.append, 5)
    assert not said


def test_sampler_reads_this_machine() -> None:
    sample = SystemSampler(lambda *_, **__: None).sample()
    assert 0 < sample["system_memory_usage_percentage"] < 100
    assert json.dumps(sample)
