"""The end of a sweep: its trials' last words, its best adapter and job file, its report."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError
from orchestrator.jobfile import dump_job
from orchestrator.places import write_whole
from orchestrator.sweep import space
from orchestrator.sweep.outcome import Outcome, best_trial, outcomes, spent_seconds
from orchestrator.sweep.report import PAGE, TABLE, write_report
from orchestrator.sweep.report.page import Winner
from orchestrator.sweep.report.table import row
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.observer import JournalObserver
from orchestrator.tracking.secrets import redact

_SUMMARY = ("steps", "tokens", "seconds", "eval_loss", "train_loss")


def settle(run_dir: Path, status: str) -> None:
    """Give each trial's journal its last word, where the end of the sweep came before it.

    Args:
        run_dir: the sweep's folder, in which nobody trains any more.
        status: what becomes of a trial that was not trained to its end.
    """
    for outcome in outcomes(run_dir / "trials"):
        if not outcome.settled:
            word = "finished" if outcome.status == "finished" else status
            summary = {name: getattr(outcome, name) for name in _SUMMARY}
            with JournalObserver(outcome.folder) as observer:
                observer.emit("finish", status=word, error=None, **summary)


def conclude(
    job: JobConfig,
    run_dir: Path,
    engine: dict[str, Any],
    observer: Any,
    registered: Callable[[], str | None],
) -> None:
    """Put the best trial's adapter, its job file and the report in the sweep's folder, and tell.

    Args:
        job: the sweep's.
        run_dir: its folder.
        engine: the proof of the best trial's adapter, if there is one.
        observer: writes the sweep's journal.
        registered: waits for MLflow and returns the adapter's model version, if it has one.

    Raises:
        OrchestratorError: no trial was trained to its end; there is a report nevertheless.
    """
    settle(run_dir, "stopped")
    found = outcomes(run_dir / "trials")
    best, winner = best_trial(found, *_aim(job)), None
    if best is not None:
        _tell_best(job, run_dir, best, engine, observer)
        text, adapter = _job_file(run_dir).read_text(), str(run_dir / "adapter")
        winner = Winner(best, text, adapter, registered())
    folder = run_dir / "report"
    write_report(job, folder, found, winner, spent_seconds(run_dir))
    if best is not None:
        shutil.copy(_job_file(run_dir), folder / "best.yaml")
    counts = {
        state: [o.status for o in found].count(state) for state in ("finished", "stopped", "failed")
    }
    observer.emit("trials", **counts, tokens=sum(o.tokens for o in found))
    observer.emit("files", path=str(folder), tables=[TABLE])
    _best(job, found)


def _tell_best(
    job: JobConfig, run_dir: Path, best: Outcome, engine: dict[str, Any], observer: Any
) -> None:
    params = best.params(_keys(job))
    _copy(best.folder / "adapter", run_dir / "adapter")
    loss = "" if best.eval_loss is None else f": eval loss {best.eval_loss:.4f}"
    head = f"# The sweep's best trial, {best.trial_id}{loss} after {best.steps} steps.\n"
    found = _without_account(space.best_job(job, params))
    write_whole(_job_file(run_dir), redact(head + dump_job(found)))
    measures = {name: getattr(best, name) for name in _SUMMARY}
    observer.emit("best", trial_id=best.trial_id, params=params, **measures)
    observer.emit(
        "adapter",
        step=best.steps,
        path=str(run_dir / "adapter"),
        eval_loss=best.eval_loss,
        proof=engine.get("proof"),
    )


def _without_account(job: JobConfig) -> JobConfig:
    """The job without who logs in to its MLflow store, which no file repeats.

    MLflow takes the account from its environment variables then.
    """
    uri = job.tracking.uri
    if uri is None or "@" not in (parts := urlsplit(uri)).netloc:
        return job
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return job.model_copy(update={"tracking": job.tracking.model_copy(update={"uri": bare})})


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
        "report": str(run_dir / "report" / PAGE),
        "model_version": model_version,
    }


def _best(job: JobConfig, found: list[Outcome]) -> Outcome:
    best = best_trial(found, *_aim(job))
    if best is None:
        errors = [f"{o.trial_id}: {o.error}" for o in found if o.error]
        why = f" The first error was of {errors[0]}" if errors else ""
        raise OrchestratorError(f"None of {len(found)} trials was trained to its end.{why}")
    return best


def _row(job: JobConfig, outcome: Outcome) -> dict[str, Any]:
    cursor = Cursor.peek(outcome.folder)
    return {**row(outcome, _keys(job)), "run_id": None if cursor is None else cursor.run_id}


def _aim(job: JobConfig) -> tuple[str, str]:
    """The metric, and whether a small or a large one is better."""
    assert job.sweep is not None
    return job.sweep.metric, job.sweep.mode


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
