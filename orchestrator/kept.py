"""What earlier commands left in a run's folder, and whether the job at hand may go on with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.identity import Change, changed_keys, changed_sweep_keys
from orchestrator.jobfile import dump_job, job_from_mapping, load_job
from orchestrator.storage.place import Place
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.journal import last_step
from orchestrator.tracking.secrets import redact


def finished_run(job: JobConfig, place: Place) -> dict[str, Any] | None:
    """The results of a finished fine-tune of just this length, if there is one."""
    run_dir = place.folder
    try:
        results = json.loads((run_dir / "result.json").read_text())
        before = load_job(run_dir / "job.yaml").training
    except (OSError, ValueError, OrchestratorError):
        return None
    same = (before.max_steps, before.epochs) == (job.training.max_steps, job.training.epochs)
    if not (same and results.get("status") == "finished" and place.has_adapter()):
        return None
    # MLflow may have taken the run only after its command had ended.
    cursor = Cursor.load(run_dir)
    return {**results, "run_id": cursor.run_id, "model_version": cursor.model_version}


def finished_sweep(run_dir: Path) -> dict[str, Any] | None:
    """The results of a finished sweep, if there is one."""
    try:
        found: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    except (OSError, ValueError):
        return None
    if found.get("status") != "finished" or "trials" not in found:
        return None
    # MLflow may have taken the runs only after their command had ended.
    for trial in (*found["trials"], found["best"]):
        if (own := Cursor.peek(run_dir / "trials" / trial["trial_id"])) is not None:
            trial["run_id"] = own.run_id
    cursor = Cursor.load(run_dir)
    return {**found, "run_id": cursor.run_id, "model_version": cursor.model_version}


def check_run(job: JobConfig, place: Place) -> None:
    """A fine-tune goes on with the job that began it, or not at all.

    Raises:
        RefusedError: other settings began it, or the folder is a sweep's.
    """
    if _holds_sweep(place.folder):
        raise RefusedError(_of_another_kind(job, place.name, "sweep", "fine-tune"))
    trained = last_step(place.folder)
    if place.begun() or trained:
        _check_same(job, place.folder, place.name, changed_keys)
        _check_length(job, place.name, trained)


def check_sweep(job: JobConfig, run_dir: Path) -> None:
    """A sweep goes on with the job that began it, or not at all.

    Raises:
        RefusedError: other settings began it, or the folder is a fine-tune's.
    """
    if _holds_sweep(run_dir):
        _check_same(job, run_dir, str(run_dir), changed_sweep_keys)
    elif (run_dir / "checkpoints").exists() or last_step(run_dir):
        raise RefusedError(_of_another_kind(job, str(run_dir), "fine-tune", "sweep"))


def _check_same(
    job: JobConfig,
    run_dir: Path,
    name: str,
    compare: Callable[[JobConfig, JobConfig], list[Change]],
) -> None:
    kept = run_dir / "job.yaml"
    if not kept.exists():
        return
    # The kept file has no passwords: compared with them, a job with one would never go on.
    now = job_from_mapping(YAML(typ="safe", pure=True).load(redact(dump_job(job))))
    changes = compare(load_job(kept), now)
    if changes:
        listed = "; ".join(f"{key} was {old!r}, is now {new!r}" for key, old, new in changes)
        raise RefusedError(
            f"{name} holds a run of this name with other settings: {listed}. "
            "Give the job another name, restore the settings, or delete that folder"
        )


def _check_length(job: JobConfig, name: str, trained: int) -> None:
    """What was trained is not undone by asking for less; of epochs the data decides later."""
    most = job.training.max_steps
    if most is not None and trained > most:
        raise RefusedError(
            f"training.max_steps is {most}, but {name} has trained {trained} steps already. "
            "Give as many, or another name"
        )


def _of_another_kind(job: JobConfig, where: str, held: str, wanted: str) -> str:
    return (
        f"{where} holds a {held} of this name. Give the {wanted} another, such as "
        f"`--set name={job.name}-{wanted}`"
    )


def _holds_sweep(run_dir: Path) -> bool:
    return (run_dir / "trials").exists() or (run_dir / ".tune").exists()
