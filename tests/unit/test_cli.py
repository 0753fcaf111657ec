"""What the commands say where they cannot go on."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator import api
from orchestrator.cli import main
from orchestrator.jobfile import dump_job, load_job


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


def test_a_loss_that_is_no_number_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"eval_loss": math.nan, "initial_eval_loss": None, "adapter": "a"}
    monkeypatch.setattr(api, "finetune", lambda *_, **__: results)
    ended = CliRunner().invoke(main, ["finetune", _job(tmp_path), "--json"])
    assert ended.exit_code == 0
    assert json.loads(ended.stdout) == {**results, "eval_loss": None}


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
