"""The report of a sweep as one HTML file that needs nothing else. Pure."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.config import LISTED_KINDS, JobConfig, SweepConfig
from orchestrator.sweep.outcome import Outcome
from orchestrator.sweep.report import table
from orchestrator.sweep.words import counted, duration, measured, metric_name, short_labels, shown

_TEMPLATE = "report.html.j2"
_BETTER = {"min": "smaller", "max": "larger"}
_DOMAINS = {
    "choice": "one of {}",
    "grid": "each of {}",
    "uniform": "{} to {}",
    "loguniform": "{} to {}, evenly by its logarithm",
    "int": "{} to {}, whole numbers",
    "logint": "{} to {}, whole numbers, evenly by their logarithm",
}


@dataclass(frozen=True)
class Picture:
    """One figure of the page; `svg` is an element, already escaped."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Winner:
    """The best trial, and what became of it. version: of the registered model, once known."""

    outcome: Outcome
    job_file: str
    adapter: str
    version: str | None


@dataclass(frozen=True)
class Cell:
    """One cell of the table; `sort` is what its column is ordered by."""

    text: str
    sort: Any
    number: bool = False


def render(
    job: JobConfig,
    found: Sequence[Outcome],
    winner: Winner | None,
    pictures: Sequence[Picture],
    seconds: float,
) -> str:
    """The whole page.

    Args:
        job: the sweep's resolved job.
        found: every trial.
        winner: the best of them; None where none was trained to its end.
        pictures: in the order they are shown.
        seconds: that the sweep took, over all commands.
    """
    assert job.sweep is not None
    keys, metric = tuple(job.sweep.search_space), job.sweep.metric
    labels = short_labels(keys)
    measures = tuple(dict.fromkeys(("eval_loss", "train_loss", metric)))
    ordered = table.ranked(found, metric, job.sweep.mode)
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(_TEMPLATE).render(
        name=job.name,
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        metric=metric_name(metric),
        cards=_cards(job.sweep, found, winner, seconds),
        winner=winner,
        winning=[] if winner is None else _winning(job, winner, keys),
        pictures=[(p.title, p.caption, Markup(p.svg)) for p in pictures],
        headings=_headings(keys, labels, measures),
        rows=[_row(outcome, keys, measures, winner) for outcome in ordered],
        failures=[(o.trial_id, o.error) for o in found if o.error],
        setup=_setup(job, job.sweep),
        space=[(key, _domain(domain)) for key, domain in job.sweep.search_space.items()],
    )


def _cards(
    sweep: SweepConfig, found: Sequence[Outcome], winner: Winner | None, seconds: float
) -> list[tuple[str, str, str]]:
    """Heading, figure and note of what matters most."""
    metric = sweep.metric
    cards = []
    if winner is not None:
        best = measured(getattr(winner.outcome, metric))
        first = [o.evaluations[0][1] for o in found if o.evaluations]
        note = f"{first[0]:.4f} before training" if first and metric == "eval_loss" else ""
        cards.append((f"Best {metric_name(metric)}", best, note))
    cards.append(("Trials", str(len(found)), counted([o.status for o in found])))
    trained = sum(o.seconds for o in found)
    cards.append(("Time", duration(seconds), f"{duration(trained)} of training steps"))
    cards.append(("Tokens trained", f"{sum(o.tokens for o in found):,}", _steps(found)))
    return cards


def _steps(found: Sequence[Outcome]) -> str:
    done = sum(o.steps for o in found)
    whole = sum(o.total_steps or 0 for o in found)
    return f"{done:,} of {whole:,} steps" if whole else ""


def _winning(job: JobConfig, winner: Winner, keys: tuple[str, ...]) -> list[tuple[str, str]]:
    best, model = winner.outcome, job.tracking.registered_model
    if model is None:
        registered = "not asked for: tracking.registered_model is null"
    elif winner.version is None:
        registered = f"{shown(model)}: not yet, for MLflow has not answered"
    else:
        registered = f"{shown(model)}, version {winner.version}"
    return [
        ("Trial", best.trial_id),
        *((key, shown(value)) for key, value in best.params(keys).items()),
        ("Eval loss", measured(best.eval_loss)),
        ("Training loss", measured(best.train_loss)),
        ("Adapter", winner.adapter),
        ("Registered model", registered),
    ]


def _headings(
    keys: Sequence[str], labels: dict[str, str], measures: Sequence[str]
) -> list[tuple[str, bool]]:
    """Names of the table's columns, and whether they hold numbers."""
    return [
        ("trial", False),
        ("state", False),
        *((labels[key], False) for key in keys),
        *((metric_name(measure), True) for measure in measures),
        ("steps", True),
        ("tokens", True),
        ("training time", True),
    ]


def _row(
    outcome: Outcome, keys: tuple[str, ...], measures: Sequence[str], winner: Winner | None
) -> dict[str, Any]:
    total = f"/{outcome.total_steps}" if outcome.total_steps else ""
    return {
        "best": winner is not None and winner.outcome.trial_id == outcome.trial_id,
        "state": outcome.status,
        "error": outcome.error,
        "trial": Cell(outcome.trial_id, outcome.trial_id),
        "values": [_cell(value) for value in outcome.params(keys).values()],
        "measures": [
            *(_measure(getattr(outcome, measure)) for measure in measures),
            Cell(f"{outcome.steps}{total}", outcome.steps, True),
            Cell(f"{outcome.tokens:,}", outcome.tokens, True),
            Cell(duration(outcome.seconds), round(outcome.seconds, 3), True),
        ],
    }


def _measure(value: float | None) -> Cell:
    return Cell(measured(value), table.finite(value), True)


def _cell(value: Any) -> Cell:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Cell(shown(value), value if number else shown(value), number)


def _domain(domain: dict[str, list[Any]]) -> str:
    kind, values = next(iter(domain.items()))
    if kind in LISTED_KINDS:
        return _DOMAINS[kind].format(", ".join(shown(value) for value in values))
    return _DOMAINS[kind].format(*map(shown, values))


def _setup(job: JobConfig, sweep: SweepConfig) -> list[tuple[str, str]]:
    quantization, training = job.quantization, job.training
    length = f"{training.epochs:g} epochs"
    if training.max_steps is not None:
        length = f"{training.max_steps} steps"
    budget = "none" if sweep.time_budget is None else duration(sweep.time_budget)
    return [
        ("Base model", shown(job.model.base)),
        ("Quantization", f"{quantization.type}, double {shown(quantization.double_quant)}"),
        ("Training data", shown(job.data.train)),
        ("Validation", shown(job.data.validation)),
        ("Length of a trial", f"{length} of {training.batch_size} sequences"),
        ("Searcher", f"{sweep.searcher}, seed {sweep.seed}"),
        ("Scheduler", sweep.scheduler),
        ("Metric", f"{sweep.metric}, {_BETTER[sweep.mode]} is better"),
        ("Trials at most", str(sweep.trials)),
        ("Time at most", budget),
        ("Placement", sweep.placement),
        *(
            (f"Point {number}", ", ".join(f"{k} {shown(v)}" for k, v in point.items()))
            for number, point in enumerate(sweep.points, 1)
        ),
    ]
