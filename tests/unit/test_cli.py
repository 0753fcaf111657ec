"""What the commands say at their end, and where they cannot go on."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from filelock import FileLock

from orchestrator import api
from orchestrator.cli import main
from orchestrator.errors import DataError, InterruptedRunError, OrchestratorError, TrainingError
from orchestrator.jobfile import dump_job, load_job
from orchestrator.tracking.delivery import DeliveryReport
from orchestrator.tracking.journal import journal_path, read_events


def _job(folder: Path, sections: str = "") -> str:
    path = folder / "job.yaml"
    head = f"name: a\noutput_dir: {folder}/runs\n"
    path.write_text(head + "model: {base: b}\ndata: {train: t.jsonl}\n" + sections)
    return str(path)


@pytest.mark.parametrize("command", ["finetune", "sweep"])
@pytest.mark.parametrize(
    ("error", "status", "word"),
    [(ValueError("odd"), 1, "failed"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_an_error_that_nobody_foresaw_is_told_in_one_object_too(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    error: BaseException,
    status: int,
    word: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(api, command, fail)
    ended = CliRunner().invoke(main, [command, _job(tmp_path), "--json"])
    assert ended.exit_code == status
    assert json.loads(ended.stdout)["status"] == word
    assert ("Traceback" in ended.stderr) == (word == "failed")


@pytest.mark.parametrize("command", [["finetune", "--local"], ["sweep"]])
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, command: list[str]) -> None:
    # A folder where the lock's file belongs refuses also root.
    (tmp_path / "runs" / "a" / ".lock").mkdir(parents=True)
    job = _job(tmp_path, "sweep: {search_space: {lora.rank: {choice: [4, 8]}}}\n")
    ended = CliRunner().invoke(main, [*command, job, "--json"])
    assert ended.exit_code == 2, ended.output
    assert "output_dir" in json.loads(ended.stdout)["error"]


def test_a_plan_refuses_a_space_that_no_sweep_takes(tmp_path: Path) -> None:
    job = _job(tmp_path, "sweep: {search_space: {lora.rank: {choice: [much]}}}\n")
    ended = CliRunner().invoke(main, ["plan", job, "--json"])
    assert ended.exit_code == 2 and "lora.rank" in json.loads(ended.stdout)["error"]


def test_results_of_a_shorter_run_are_not_those_of_a_longer_one_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run_dir, begun = _job(tmp_path), tmp_path / "runs" / "a", []

    def killed(*_: Any) -> None:
        begun.append("run")
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "_run", killed)
    (run_dir / "adapter").mkdir(parents=True)
    shorter = load_job(job, ["training.max_steps=40"])
    (run_dir / "job.yaml").write_text(dump_job(shorter))
    (run_dir / "result.json").write_text('{"status": "finished", "steps": 40}')
    same = api.finetune(shorter)
    assert same["steps"] == 40 and not begun
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            api.finetune(job, ["training.max_steps=80"])
    assert len(begun) == 2


class _NoMLflow:
    """Stands in for a run's delivery."""

    def __init__(self, *_: Any) -> None: ...

    def start(self) -> None: ...

    def close(self, timeout: float) -> DeliveryReport:
        return DeliveryReport(None, None, 0)


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/a/result.json").read_text(), parse_constant=pytest.fail)


def test_a_loss_that_is_no_number_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"initial_eval_loss": None, "eval_loss": math.nan, "train_loss": 2.0}
    monkeypatch.setattr(api, "Delivery", _NoMLflow)
    monkeypatch.setattr(api, "_train_here", lambda *_: found)
    ended = CliRunner().invoke(main, ["finetune", "--local", _job(tmp_path), "--json"])
    assert ended.exit_code == 0, ended.output
    printed = json.loads(ended.stdout, parse_constant=pytest.fail)
    assert printed == _result(tmp_path)
    assert (printed["eval_loss"], printed["train_loss"]) == (None, 2.0)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (DataError("no rows"), "refused"),
        (TrainingError("the loss is nan"), "failed"),
        (InterruptedRunError("stopped"), "interrupted"),
    ],
)
def test_how_a_run_ended_is_the_same_word_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OrchestratorError, word: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(api, "Delivery", _NoMLflow)
    monkeypatch.setattr(api, "_train_here", fail)
    ended = CliRunner().invoke(main, ["finetune", "--local", _job(tmp_path), "--json"])
    assert ended.exit_code == error.exit_status
    (last,) = (event for event, _ in read_events(journal_path(tmp_path / "runs/a")))
    said = [json.loads(ended.stdout), _result(tmp_path), last]
    assert [(each["status"], each["error"]) for each in said] == [(word, str(error))] * 3


@pytest.mark.parametrize("command", [["finetune", "--local"], ["sweep"]])
def test_two_commands_do_not_share_a_run(tmp_path: Path, command: list[str]) -> None:
    job = _job(tmp_path, "sweep: {search_space: {lora.rank: {choice: [4, 8]}}}\n")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    with FileLock(tmp_path / "runs" / "a" / ".lock"):
        ended = CliRunner().invoke(main, [*command, job, "--json"])
    assert ended.exit_code == 2
    assert "runs/a is in use" in json.loads(ended.stdout)["error"]


@pytest.mark.parametrize(
    ("program", "named"),
    [
        (".venv/bin/orchestrator", ".venv/bin/orchestrator"),
        # What `ray job submit` starts has no `ui`.
        ("jobs/finetune.py", "orchestrator"),
    ],
)
def test_the_command_for_the_ui_is_one_that_can_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, named: str
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(api, "finetune", lambda *_, **__: {"adapter": "a"})
    job, said = _job(tmp_path), []
    for setting in (
        "lora.rank=8",
        f"output_dir={tmp_path}/other runs",
        "tracking.uri=https://ann:s3cret@host",
    ):
        ended = CliRunner().invoke(main, ["finetune", job, "--set", setting])
        assert ended.exit_code == 0, ended.output
        said.append(ended.stderr.splitlines()[-1].removeprefix("MLflow UI    "))
    assert said == [
        f"{named} ui {job}",
        f"{named} ui {job} '--set=output_dir={tmp_path}/other runs'",
        f"{named} ui {job} '--set=tracking.uri=https://***@host'",
    ]
