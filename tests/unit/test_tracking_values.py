"""Secrets, parameters, metrics, tables and the champion: all without MLflow."""

import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import DataConfig, JobConfig, ModelConfig, TrackingConfig
from orchestrator.errors import OrchestratorError
from orchestrator.jobfile import dump_job
from orchestrator.tracking import report, values
from orchestrator.tracking.champion import Decision, Version, decide
from orchestrator.tracking.earlier import earlier_job, is_finished
from orchestrator.tracking.secrets import redact
from orchestrator.tracking.store import artifact_location, tracking_uri
from orchestrator.tracking.system import SystemSampler
from orchestrator.tracking.ui import ui_command


def make_job(**tracking: Any) -> JobConfig:
    return JobConfig(
        name="bot",
        output_dir="runs",
        model=ModelConfig(base="base"),
        data=DataConfig(train="a.jsonl", columns={"q/x:é": "Q"}),
        tracking=TrackingConfig(**tracking),
    )


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("http://ann:s3cret@host:5000/x", "http://***@host:5000/x"),
        ("postgresql://ann:p@ss@db/x", "postgresql://***@db/x"),
        ("see http://h/?a=1&access_token=abc&b=2", "see http://h/?a=1&access_token=***&b=2"),
        ("?X-Amz-Signature=00ff", "?X-Amz-Signature=***"),
        ("hf_abcdefghijklmnopqrst", "***"),
        ("key sk-abcdefghijklmnop0123", "key ***"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("Authorization: Bearer abcdefgh.ijkl", "Authorization: Bearer ***"),
        ("http://host/a@b task-of-a-long-name disk-space", None),
    ],
)
def test_secrets_are_hidden_by_their_shape(text: str, hidden: str | None) -> None:
    assert redact(text) == (text if hidden is None else hidden)
    assert redact(redact(text)) == redact(text)


def test_secrets_are_hidden_by_their_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "12345678")
    monkeypatch.setenv("OTHER_TOKEN", "12345678-longer")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("MAX_TOKENS", "100000")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "harmless")
    monkeypatch.setenv("APPLICATION_CREDENTIALS", str(tmp_path))
    text = f"12345678-longer 12345678 abc 100000 harmless {tmp_path}"
    assert redact(text) == f"*** *** abc 100000 harmless {tmp_path}"


def test_the_whole_job_becomes_parameters() -> None:
    job = make_job(uri="http://ann:s3cret@host")
    flat = values.parameters(job)
    assert flat["lora.rank"] == "16" and flat["training.max_steps"] == "None"
    assert flat["tracking.uri"] == "http://***@host"
    assert flat["data.columns.q_x_é"] == "Q"
    assert len(values.text("x" * 10_000)) == 5000 and len(values.key("x" * 300)) == 250


def test_readings_carry_the_journals_time_and_step() -> None:
    step = {"event": "step", "time": 12.3456, "step": 7, "loss": 1, "note": "x", "seconds": None}
    assert values.readings(step) == [("loss", 1.0, 12345, 7)]
    system = {"event": "system", "time": 20.5, "cpu_utilization_percentage": 3.0}
    assert values.readings(system) == [("system/cpu_utilization_percentage", 3.0, 20500, 20)]
    assert values.readings({"event": "checkpoint", "time": 1.0, "step": 3, "loss": 2.0}) == []


def test_what_is_not_finite_becomes_a_tag() -> None:
    step = {"event": "step", "time": 1.0, "step": 7, "loss": math.nan, "gradient_norm": math.inf}
    assert values.readings(step) == []
    assert values.broken(step) == {
        "not_finite.loss": "nan at step 7",
        "not_finite.gradient_norm": "inf at step 7",
    }


@pytest.mark.parametrize(
    ("new", "present", "decision"),
    [
        (2.0, None, Decision.PROMOTE),
        (None, None, Decision.PROMOTE),
        (1.9, Version("1", 2.0), Decision.PROMOTE),
        (2.0, Version("1", 2.0), Decision.KEEP),
        (2.1, Version("1", 2.0), Decision.KEEP),
        (None, Version("1", 2.0), Decision.KEEP),
        (math.nan, Version("1", 2.0), Decision.KEEP),
        (math.nan, Version("1", None), Decision.KEEP),
        (None, Version("1", None), Decision.KEEP),
        (2.0, Version("1", None), Decision.PROMOTE),
        (2.0, Version("1", math.nan), Decision.PROMOTE),
        (1.0, Version("2", 5.0), Decision.KEEP),
    ],
)
def test_champion(new: float | None, present: Version | None, decision: Decision) -> None:
    assert decide(Version("2", new), present) is decision


def test_samples_meet_in_one_row_and_a_later_answer_wins() -> None:
    def sample(when: str, step: int, answer: str) -> dict[str, Any]:
        about = {"index": 0, "prompt": "p", "reference": "r"}
        return {"event": "sample", "when": when, "step": step, "answer": answer, **about}

    events = [sample("before", 0, "a"), sample("after", 5, "b"), sample("after", 9, "c")]
    table = report.sample_table(events)
    assert table == {
        "columns": ["index", "prompt", "reference", "before", "after"],
        "data": [[0, "p", "r", "a", "c"]],
    }
    assert report.sample_table([]) is None and report.loss_curve([], "x") is None


def test_the_curve_is_drawn_with_names_and_gaps(tmp_path: Path) -> None:
    events = [{"event": "step", "step": s, "loss": math.nan if s == 2 else 1.0} for s in range(4)]
    figure = report.loss_curve([*events, {"event": "evaluation", "step": 3, "eval_loss": 1}], "a$b")
    figure.savefig(tmp_path / "x.png")
    assert [line.get_label() for line in figure.axes[0].lines] == ["training loss", "eval loss"]


def test_the_store_lies_under_output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(make_job()) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert artifact_location(make_job()) == f"file://{tmp_path}/runs/mlartifacts"
    remote = make_job(uri="http://host")
    assert (tracking_uri(remote), artifact_location(remote)) == ("http://host", None)
    own = make_job(uri=f"sqlite:///{tmp_path}/own/store.db?timeout=9")
    assert artifact_location(own) == f"file://{tmp_path}/own/mlartifacts"


def test_the_ui_serves_this_machine_alone() -> None:
    command = ui_command(make_job(), 5050)
    assert command is not None and command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "5050"
    assert ui_command(make_job(uri="https://host")) is None
    assert ui_command(make_job(uri="databricks")) is None


def test_an_earlier_job_gets_its_password_from_the_present_one(tmp_path: Path) -> None:
    own = make_job(uri="http://ann:s3cret@host")
    (tmp_path / "job.yaml").write_text(redact(dump_job(own)))
    assert earlier_job(tmp_path, own) == own
    with pytest.raises(OrchestratorError, match="password"):
        earlier_job(tmp_path, make_job(uri="http://bob:s3cret@elsewhere"))
    (tmp_path / "job.yaml").write_text("name: [")
    with pytest.raises(OrchestratorError, match=r"job\.yaml"):
        earlier_job(tmp_path, own)


def test_a_run_that_went_on_is_not_finished(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    start, finish = '{"event": "start"}\n', '{"event": "finish", "status": "finished"}\n'
    for text, finished in ((start, False), (start + finish, True), (start + finish + start, False)):
        path.write_text(text)
        assert is_finished(path) is finished


def test_the_sampler_samples_until_it_is_stopped() -> None:
    events: list[dict[str, Any]] = []
    twice = threading.Event()

    def emit(event: str, **fields: Any) -> None:
        events.append({"event": event, **fields})
        if len(events) == 2:
            twice.set()

    sampler = SystemSampler(emit, seconds=0.01)
    sampler.start()
    assert twice.wait(5)
    sampler.stop()
    count = len(events)
    assert events[0]["event"] == "system" and events[0]["system_memory_usage_megabytes"] > 0
    assert not threading.Event().wait(0.05) and len(events) == count


def test_a_sampler_survives_a_full_disk() -> None:
    called = threading.Event()

    def emit(event: str, **fields: Any) -> None:
        called.set()
        raise OSError("No space left on device")

    with SystemSampler(emit, seconds=0.01):
        assert called.wait(5)


def test_importing_the_room_does_not_import_mlflow() -> None:
    code = (
        "import sys, orchestrator.tracking.delivery, orchestrator.tracking.observer,"
        " orchestrator.tracking.ui; sys.exit('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
