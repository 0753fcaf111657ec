"""What the commands say where they cannot go on."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orchestrator import api
from orchestrator.cli import main


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
    job = tmp_path / "job.yaml"
    job.write_text("name: a\nmodel: {base: b}\ndata: {train: t.jsonl}\n")
    ended = CliRunner().invoke(main, [command, str(job), "--json"])
    assert ended.exit_code == status
    assert json.loads(ended.stdout)["status"] == word
    assert ("Traceback" in ended.stderr) == (word == "failed")
