"""What the trials came to, read from their journals. Pure; knows neither Ray nor MLflow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError
from orchestrator.jobfile import load_job
from orchestrator.sweep.space import value_of
from orchestrator.tracking.journal import journal_path, read_events
from orchestrator.training.progress import perplexity


@dataclass(frozen=True)
class Outcome:
    """One trial.

    status: finished (trained to its end), stopped (by the scheduler or the time budget), failed,
    interrupted (with the whole sweep), running, or waiting (before its first start). eval_loss is
    that of the last evaluation after a step, None where there was none; it may be NaN. seconds are
    of training steps; began and ended are Unix times of its first and last event. settled: the
    journal has its last word.
    """

    trial_id: str
    folder: Path
    job: JobConfig
    status: str
    steps: int
    total_steps: int | None
    tokens: int
    seconds: float
    eval_loss: float | None
    train_loss: float | None
    losses: tuple[tuple[int, float], ...]
    evaluations: tuple[tuple[int, float], ...]
    error: str | None
    began: float | None
    ended: float | None
    settled: bool

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
        return {key: value_of(self.job, key) for key in keys}


def outcomes(trials_dir: Path) -> list[Outcome]:
    """Every trial that was proposed, in the order they began."""
    folders = sorted(path.parent for path in trials_dir.glob("*/job.yaml"))
    return sorted((_outcome(folder) for folder in folders), key=_place)


def spent_seconds(run_dir: Path) -> float:
    """Seconds that commands over this sweep took until now, the pauses between them left out."""
    times = sorted(
        (event["time"], event["event"])
        for path in (journal_path(run_dir), *run_dir.glob("trials/*/journal.jsonl"))
        if path.exists()
        for event, _ in read_events(path)
    )
    spent = last = 0.0
    for moment, event in times:
        spent += 0.0 if event == "command" or not last else moment - last
        last = moment
    return spent


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
    # Before the first step every trial has the base's own eval loss, which says nothing of it.
    own = [event["eval_loss"] for event in held_out if event["step"] > 0]
    starts = [event for event in events if event["event"] == "start"]
    ends = [event for event in events if event["event"] in ("start", "finish")]
    settled = bool(ends) and ends[-1]["event"] == "finish"
    return Outcome(
        trial_id=folder.name,
        folder=folder,
        job=_job(folder),
        status=_status(events, ends),
        steps=max((event["step"] for event in steps), default=0),
        total_steps=starts[-1]["total_steps"] if starts else None,
        tokens=sum(event["tokens"] for event in steps),
        seconds=sum(event["seconds"] for event in steps),
        eval_loss=own[-1] if own else None,
        train_loss=steps[-1]["loss"] if steps else None,
        losses=tuple((event["step"], event["loss"]) for event in steps),
        evaluations=tuple((event["step"], event["eval_loss"]) for event in held_out),
        error=ends[-1].get("error") if ends else None,
        began=events[0]["time"] if events else None,
        ended=events[-1]["time"] if events else None,
        settled=settled,
    )


def _status(events: Sequence[dict[str, Any]], ends: Sequence[dict[str, Any]]) -> str:
    if any(event["event"] == "adapter" for event in events):
        # Saved at the very end, just before the word that it is finished.
        return "finished"
    if not ends:
        return "running" if events else "waiting"
    return str(ends[-1]["status"]) if ends[-1]["event"] == "finish" else "running"


def _job(folder: Path) -> JobConfig:
    try:
        return load_job(folder / "job.yaml")
    except OrchestratorError as error:
        raise OrchestratorError(
            f"The trial in {folder} cannot be read: {error}. Delete that folder and run the same "
            "command again"
        ) from error


def _place(outcome: Outcome) -> tuple[float, str]:
    """Tune's ids are numbered by some searchers, random by others."""
    return (math.inf if outcome.began is None else outcome.began, outcome.trial_id)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
