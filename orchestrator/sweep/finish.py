"""The end of a sweep: its best adapter, its best job file, its report."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError
from orchestrator.jobfile import dump_job
from orchestrator.sweep import space
from orchestrator.sweep.outcome import Outcome, best_trial, outcomes
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.secrets import redact


def conclude(job: JobConfig, run_dir: Path, engine: dict[str, Any], observer: Any) -> None:
    """Put the best trial's adapter and job file in the sweep's folder, and tell.

    Raises:
        OrchestratorError: no trial was trained to its end.
    """
    found = outcomes(run_dir / "trials")
    best = _best(job, found)
    _copy(best.folder / "adapter", run_dir / "adapter")
    _write(_job_file(run_dir), redact(dump_job(space.best_job(job, best.params(_keys(job))))))
    table = [_row(job, o) for o in found]
    (run_dir / "report").mkdir(exist_ok=True)
    _write(run_dir / "report" / "trials.json", json.dumps(table, indent=1))
    shutil.copy(_job_file(run_dir), run_dir / "report" / "best.yaml")
    observer.emit("best", trial_id=best.trial_id, params=best.params(_keys(job)))
    observer.emit("files", path=str(run_dir / "report"))
    observer.emit(
        "adapter",
        step=best.steps,
        path=str(run_dir / "adapter"),
        eval_loss=best.eval_loss,
        proof=engine.get("proof"),
    )


def results(
    job: JobConfig,
    run_dir: Path,
    status: str,
    seconds: float,
    run_id: str | None,
    model_version: str | None,
) -> dict[str, Any]:
    """The object that `sweep --json` prints."""
    found = outcomes(run_dir / "trials")
    best = _best(job, found)
    return {
        "status": status,
        "name": job.name,
        "run_id": run_id,
        "seconds": seconds,
        "trials": [_row(job, outcome) for outcome in found],
        "best": {**_row(job, best), "job": str(_job_file(run_dir))},
        "adapter": str(run_dir / "adapter"),
        "report": str(run_dir / "report"),
        "model_version": model_version,
    }


def _best(job: JobConfig, found: list[Outcome]) -> Outcome:
    assert job.sweep is not None
    best = best_trial(found, job.sweep.metric, job.sweep.mode)
    if best is None:
        errors = [f"{o.trial_id}: {o.error}" for o in found if o.error]
        why = f" The first error was of {errors[0]}" if errors else ""
        raise OrchestratorError(f"None of {len(found)} trials was trained to its end.{why}")
    return best


def _row(job: JobConfig, outcome: Outcome) -> dict[str, Any]:
    cursor = Cursor.peek(outcome.folder)
    return {
        "trial_id": outcome.trial_id,
        "run_id": None if cursor is None else cursor.run_id,
        "params": outcome.params(_keys(job)),
        "status": outcome.status,
        "steps": outcome.steps,
        "eval_loss": outcome.eval_loss,
        "train_loss": outcome.train_loss,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "error": outcome.error,
    }


def _keys(job: JobConfig) -> tuple[str, ...]:
    return tuple(job.sweep.search_space) if job.sweep is not None else ()


def _job_file(run_dir: Path) -> Path:
    return run_dir / "best.yaml"


def _copy(source: Path, target: Path) -> None:
    """Copy beside and rename."""
    beside = target.with_name(f".{target.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.replace(target)


def _write(path: Path, text: str) -> None:
    """Write beside and rename."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)
