"""What a finished sweep tells at its end."""

import io
from pathlib import Path

from rich.console import Console

from orchestrator.summary import show_sweep
from orchestrator.sweep.outcome import best_trial, outcomes
from orchestrator.sweep.report.table import row
from tests.unit.sweeps import SPACE, Trained, sweep_job, write_trials

PARAMS = {"lora.rank": 8, "training.learning_rate": 1e-3}


def _told(tmp_path: Path, trials: list[Trained], space: dict = SPACE) -> list[str]:
    job = sweep_job(tmp_path, space)
    found = outcomes(write_trials(job, trials))
    best = best_trial(found, "eval_loss", "min")
    assert best is not None
    results = {
        "trials": [row(outcome, tuple(space)) for outcome in found],
        "best": {**row(best, tuple(space)), "job": "runs/search/best.yaml"},
        "seconds": 75.0,
        "adapter": "runs/search/adapter",
        "report": "runs/search/report/report.html",
        "model_version": "3",
    }
    console = Console(file=io.StringIO(), width=110)
    show_sweep(job, "bin/orchestrator ui job.yaml", results, console)
    return console.file.getvalue().splitlines()


def test_the_best_comes_first_and_everything_is_named(tmp_path: Path) -> None:
    lines = _told(
        tmp_path,
        [
            Trained(PARAMS, [4, 3, 3, 2, 2, 2.5]),
            Trained(PARAMS, [4, 1], "stopped"),
            Trained(PARAMS, [4, 3, 3, 2, 2, 1.5]),
            Trained(PARAMS, [], "failed", "no layer is named [bold]x[/bold]"),
            Trained(PARAMS, [4, 3, 3, 3, 3, float("nan")]),
        ],
    )
    rows = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert rows == [f"abc_0000{number}" for number in (2, 0, 4, 1, 3)]
    text = "\n".join(lines)
    assert "Trials       3 finished, 1 stopped, 1 failed, 1:15 min for all" in text
    assert "Best         abc_00002, eval loss 1.5000" in text
    assert "abc_00003 failed: no layer is named [bold]x[/bold]" in text
    for name in ("best.yaml", "search/adapter", "report.html", "searched, version 3"):
        assert name in text
    assert "MLflow UI    bin/orchestrator ui job.yaml" in text


def test_many_trials_are_cut_to_the_best(tmp_path: Path) -> None:
    trials = [Trained(PARAMS, [4, 3, 3, 3, 3, 1 + place / 10]) for place in range(25)]
    trials += [Trained(PARAMS, [], "failed", "no such layer")] * 9
    lines = _told(tmp_path, trials)
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) == 20 and "abc_00019" in rows[-1]
    assert "and 14 more; the report has them all" in lines
    assert sum("no such layer" in line for line in lines) == 3


def test_values_are_texts_and_no_markup(tmp_path: Path) -> None:
    space = {"lora.target_modules": {"choice": [["[red]q[/red]", "v_proj"]]}}
    lines = _told(
        tmp_path, [Trained({"lora.target_modules": ["[red]q[/red]", "v_proj"]}, [2] * 6)], space
    )
    assert any("[red]q[/red], v_proj" in line for line in lines)
