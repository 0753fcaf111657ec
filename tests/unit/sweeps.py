"""Folders of sweeps as trials leave them: job files and journals by the real writers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import JobConfig
from orchestrator.jobfile import dump_job, job_from_mapping
from orchestrator.sweep.space import trial_job
from orchestrator.tracking.journal import Journal, journal_path
from orchestrator.tracking.store import tracking_uri

SPACE = {
    "lora.rank": {"choice": [4, 8, 16, 32]},
    "training.learning_rate": {"loguniform": [1e-4, 1e-2]},
}


@dataclass(frozen=True)
class Trained:
    """What a trial did. losses: of its steps; end: its last word; joined: it was started."""

    params: Mapping[str, Any]
    losses: Sequence[float] = ()
    end: str | None = "finished"
    error: str | None = None
    joined: bool = True


def sweep_job(
    folder: Path, space: Mapping[str, Any] = SPACE, *, max_steps: int = 6, **sweep: Any
) -> JobConfig:
    """A sweep's job whose runs lie in a folder."""
    return job_from_mapping(
        {
            "name": "search",
            "output_dir": str(folder / "runs"),
            "model": {"base": "some/model"},
            "data": {"train": "train.jsonl"},
            "training": {"max_steps": max_steps},
            "tracking": {"registered_model": "searched"},
            "sweep": {"search_space": {k: dict(v) for k, v in space.items()}, **sweep},
        }
    )


def write_trials(job: JobConfig, trials: Sequence[Trained], every: int = 2) -> Path:
    """Write each trial's folder, named by its place; returns the folder of them all."""
    folder = job.run_dir / "trials"
    for number, trial in enumerate(trials):
        write_trial(job, folder / f"abc_{number:05d}", trial, every)
    return folder


def write_trial(job: JobConfig, folder: Path, trial: Trained, every: int = 2) -> None:
    """Write one trial's job file and journal; an evaluation equals the last step's loss."""
    own = trial_job(job, folder.name, folder.parent, trial.params, tracking_uri(job))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(dump_job(own))
    if not trial.joined:
        return
    total = job.training.max_steps or 0
    with Journal(journal_path(folder)) as journal:
        start(journal, total)
        for step, loss in enumerate(trial.losses, 1):
            take_step(journal, step, loss)
            if step % every == 0 or step == total:
                journal.append("evaluation", step=step, eval_loss=loss, perplexity=2.0)
        if trial.end is not None:
            finish(journal, trial.end, trial.error, trial.losses)


def start(journal: Journal, total: int, resumed_from: int = 0) -> None:
    journal.append(
        "start",
        resumed_from=resumed_from,
        total_steps=total,
        workers=1,
        device="cpu",
        trainable_parameters=1000,
    )
    journal.append("evaluation", step=0, eval_loss=5.0, perplexity=148.4)


def take_step(journal: Journal, step: int, loss: float, seconds: float = 0.5) -> None:
    journal.append(
        "step",
        step=step,
        loss=loss,
        learning_rate=1e-3,
        gradient_norm=0.1,
        tokens=100,
        target_tokens=50,
        tokens_per_second=200.0,
        seconds=seconds,
        memory_bytes=2**30,
    )


def finish(journal: Journal, status: str, error: str | None, losses: Sequence[float]) -> None:
    if status == "finished":
        journal.append("adapter", step=len(losses), path="adapter", eval_loss=losses[-1])
    journal.append(
        "finish",
        status=status,
        error=error,
        steps=len(losses),
        tokens=100 * len(losses),
        seconds=0.5 * len(losses),
    )
