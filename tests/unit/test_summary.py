"""What a finished fine-tune tells at its end."""

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.config import JobConfig
from orchestrator.jobfile import job_from_mapping
from orchestrator.summary import show

RESULTS: dict[str, Any] = {
    "initial_eval_loss": 3.0,
    "eval_loss": 2.0,
    "steps": 40,
    "tokens": 12345,
    "tokens_per_second": 311.4,
    "peak_memory_bytes": 2**31,
    "restarts": 1,
    "adapter": "runs/bot/adapter",
    "model_version": "3",
}


def _job(folder: Path) -> JobConfig:
    job = job_from_mapping(
        {
            "name": "bot",
            "output_dir": str(folder),
            "model": {"base": "some/model"},
            "data": {"train": "train.jsonl"},
            "tracking": {"registered_model": "support"},
        }
    )
    job.run_dir.mkdir()
    return job


def _told(job: JobConfig, results: dict[str, Any]) -> list[str]:
    console = Console(file=io.StringIO(), width=110)
    show(job, "bin/orchestrator ui job.yaml", results, console)
    return console.file.getvalue().splitlines()


def test_losses_speed_and_places_are_told(tmp_path: Path) -> None:
    assert _told(_job(tmp_path), RESULTS) == [
        "Eval loss    3.0000 before, 2.0000 after",
        "Trained      40 steps, 12,345 tokens, 311 tokens/s, 2.0 GiB at the peak, 1 restarts",
        "Adapter      runs/bot/adapter",
        "Registered   support, version 3",
        "MLflow UI    bin/orchestrator ui job.yaml",
    ]


def test_what_was_not_measured_is_not_told(tmp_path: Path) -> None:
    results = {**RESULTS, "eval_loss": None, "tokens_per_second": None, "model_version": None}
    assert [line.split()[0] for line in _told(_job(tmp_path), results)] == ["Adapter", "MLflow"]


def test_answers_before_and_after_stand_beside_their_prompts(tmp_path: Path) -> None:
    job, samples = _job(tmp_path), []
    for index, (asked, wanted) in enumerate([("red cat", "[b]dog[/b]"), ("blue bird", "one")]):
        about = {"index": index, "prompt": f"<user> {asked} <answer>", "reference": wanted}
        for when in ("before", "after"):
            samples.append({"when": when, "answer": f"{when} {index}", **about})
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (job.run_dir / "samples.jsonl").write_text(lines)
    told = [line for line in _told(job, RESULTS) if line.startswith("│")]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in told]
    # What all prompts share is the template.
    assert rows == [
        ["red cat", "before 0", "after 0", "[b]dog[/b]"],
        ["blue bird", "before 1", "after 1", "one"],
    ]
