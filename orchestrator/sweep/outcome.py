"""What the trials came to, read from their journals. Pure; knows neither Ray nor MLflow."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError
from orchestrator.jobfile import load_job
from orchestrator.tracking.journal import journal_path, read_events
from orchestrator.training.progress import perplexity


@dataclass(frozen=True)
class Outcome:
    """One trial.

    status: finished (trained to its end), stopped (by the scheduler or the time budget), failed,
    or running. The losses are those of the last evaluation; seconds are of training steps.
    """

    trial_id: str
    folder: Path
    job: JobConfig
    status: str
    steps: int
    tokens: int
    seconds: float
    eval_loss: float | None
    train_loss: float | None
    losses: tuple[tuple[int, float], ...]
    evaluations: tuple[tuple[int, float], ...]
    error: str | None

    @property
    def perplexity(self) -> float | None:
        """Of the last evaluation."""
        return None if self.eval_loss is None else perplexity(self.eval_loss)

    @property
    def tokens_per_second(self) -> float | None:
        """Over training steps alone."""
        return self.tokens / self.seconds if self.seconds else None

    def params(self, keys: tuple[str, ...]) -> dict[str, Any]:
        """The trial's values of the searched keys."""
        return {key: _value(self.job, key) for key in keys}


def outcomes(trials_dir: Path) -> list[Outcome]:
    """Every trial that was begun, in the order they were proposed."""
    folders = sorted(path.parent for path in trials_dir.glob("*/job.yaml"))
    return sorted((_outcome(folder) for folder in folders), key=lambda o: _place(o.trial_id))


def best_trial(found: list[Outcome], metric: str, mode: str) -> Outcome | None:
    """The finished trial with the smallest metric, or the largest with `mode` max."""
    whole = [o for o in found if o.status == "finished" and _finite(getattr(o, metric))]
    choose = max if mode == "max" else min
    return choose(whole, key=lambda o: getattr(o, metric), default=None)


def _outcome(folder: Path) -> Outcome:
    path = journal_path(folder)
    events = [event for event, _ in read_events(path)] if path.exists() else []
    steps = [event for event in events if event["event"] == "step"]
    held_out = [event for event in events if event["event"] == "evaluation"]
    ends = [event for event in events if event["event"] in ("start", "finish")]
    status = ends[-1]["status"] if ends and ends[-1]["event"] == "finish" else "running"
    if any(event["event"] == "adapter" for event in events):
        # Saved at the very end, just before the word that it is finished.
        status = "finished"
    return Outcome(
        trial_id=folder.name,
        folder=folder,
        job=_job(folder),
        status=status,
        steps=max((event["step"] for event in steps), default=0),
        tokens=sum(event["tokens"] for event in steps),
        seconds=sum(event["seconds"] for event in steps),
        eval_loss=held_out[-1]["eval_loss"] if held_out else None,
        train_loss=steps[-1]["loss"] if steps else None,
        losses=tuple((event["step"], event["loss"]) for event in steps),
        evaluations=tuple((event["step"], event["eval_loss"]) for event in held_out),
        error=ends[-1].get("error") if ends else None,
    )


def _job(folder: Path) -> JobConfig:
    try:
        return load_job(folder / "job.yaml")
    except OrchestratorError as error:
        raise OrchestratorError(
            f"The trial in {folder} cannot be read: {error}. Delete that folder and run the same "
            "command again"
        ) from error


def _value(job: JobConfig, key: str) -> Any:
    value: Any = job
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _place(trial_id: str) -> tuple[int, str]:
    """Tune's ids end with the number of the trial."""
    number = trial_id.rpartition("_")[2]
    return (int(number) if number.isdigit() else 0, trial_id)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
