"""The trials as rows: for the command's results, for MLflow's table, for the page. Pure."""

import math
from collections.abc import Sequence
from typing import Any

from orchestrator.sweep.outcome import Outcome
from orchestrator.sweep.words import STATES, shown

_MEASURES = (
    "steps",
    "eval_loss",
    "perplexity",
    "train_loss",
    "tokens",
    "tokens_per_second",
    "seconds",
)


def row(outcome: Outcome, keys: Sequence[str]) -> dict[str, Any]:
    """One trial's results; a loss that is no number is None, for JSON has no other word."""
    return {
        "trial_id": outcome.trial_id,
        "params": outcome.params(tuple(keys)),
        "status": outcome.status,
        "steps": outcome.steps,
        "eval_loss": finite(outcome.eval_loss),
        "perplexity": finite(outcome.perplexity),
        "train_loss": finite(outcome.train_loss),
        "tokens": outcome.tokens,
        "tokens_per_second": outcome.tokens_per_second,
        "seconds": outcome.seconds,
        "error": outcome.error,
    }


def mlflow_table(
    found: Sequence[Outcome], keys: Sequence[str], metric: str, mode: str
) -> dict[str, Any]:
    """As MLflow lays tables out; best trials first."""
    rows = [row(outcome, keys) for outcome in ranked(found, metric, mode)]
    columns = ["trial_id", "status", *keys, *_MEASURES, "error"]
    cells = [[r["params"].get(name, r.get(name)) for name in columns] for r in rows]
    plain = [
        [c if isinstance(c, (int, float, str)) or c is None else shown(c) for c in line]
        for line in cells
    ]
    return {"columns": columns, "data": plain}


def ranked(found: Sequence[Outcome], metric: str, mode: str) -> list[Outcome]:
    """Finished trials by their metric, then the others by how far they came."""
    return sorted(found, key=lambda outcome: rank(row(outcome, ()), metric, mode))


def rank(trial: dict[str, Any], metric: str, mode: str) -> tuple[int, float, float]:
    """The place of a trial's row: by state, then by steps where they differ, then by metric."""
    state = STATES.index(trial["status"]) if trial["status"] in STATES else len(STATES)
    steps = 0 if trial["status"] == "finished" else -trial["steps"]
    value = trial[metric]
    if value is None:
        return state, steps, math.inf
    return state, steps, -value if mode == "max" else value


def finite(loss: float | None) -> float | None:
    """The number, if it is one."""
    return loss if loss is not None and math.isfinite(loss) else None
