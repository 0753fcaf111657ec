"""Pictures of a sweep: its curves, its losses over a searched key, what mattered. Pure."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from orchestrator.config import SweepConfig
from orchestrator.sweep.outcome import Outcome
from orchestrator.sweep.report import canvas
from orchestrator.sweep.report.canvas import BAD, INK, Colours
from orchestrator.sweep.report.dimension import Dimension, across
from orchestrator.sweep.report.importance import Importance
from orchestrator.sweep.words import metric_name

# Points of a curve: more cannot be told apart, and a page of 200 trials stays small.
_MOST_POINTS = 200

Points = Sequence[tuple[int, float]]


def loss_curves(
    found: Sequence[Outcome], dimensions: Sequence[Dimension], best: Outcome | None
) -> Figure | None:
    """Training and eval loss of every trial over steps; None before the first step of any."""
    if not any(outcome.losses for outcome in found):
        return None
    evaluated = any(step > 0 for outcome in found for step, _ in outcome.evaluations)
    figure = canvas.blank()
    over, _ = across(dimensions)
    colours = Colours(over)
    panels = figure.subplots(1, 2 if evaluated else 1, squeeze=False)[0]
    for axes, metric in zip(panels, ("train_loss", "eval_loss"), strict=False):
        curves = [o.losses if metric == "train_loss" else o.evaluations for o in found]
        for place, outcome in enumerate(found):
            _curve(axes, curves[place], outcome, colours.of(place), metric == "eval_loss", best)
        losses = [loss for curve in curves for _, loss in curve]
        canvas.limit_losses(axes, [curve[0][1] for curve in curves if curve], losses)
        axes.set(xlabel="step", ylabel=_label(metric))
        canvas.dress(axes)
    colours.explain(figure, panels[-1], canvas.state_marks(found))
    return figure


def metric_over(
    found: Sequence[Outcome],
    dimensions: Sequence[Dimension],
    sweep: SweepConfig,
    best: Outcome | None,
) -> Figure | None:
    """The last value of each trial's metric over one searched key, coloured by another."""
    over, by = across(dimensions)
    values = [value(outcome, sweep.metric) for outcome in found]
    known = [reached for reached in values if reached is not None]
    if over is None or not known:
        return None
    figure = canvas.blank()
    axes = figure.add_subplot()
    canvas.scale_axis(axes, "x", over)
    colours, places = Colours(by), over.places()
    high = canvas.high_end(known, sweep.mode)
    for number, (outcome, reached) in enumerate(zip(found, values, strict=True)):
        colour = colours.of(number)
        inside = colour if outcome.status == "finished" else "none"
        if reached is None:
            # Nothing is known but where it was tried.
            _at_the_edge(axes, places[number], "x", BAD, BAD)
        elif reached > high:
            _at_the_edge(axes, places[number], "^", colour, inside)
        else:
            axes.plot(places[number], reached, "o", ms=9, mec=colour, mfc=inside, mew=1.8)
    if best is not None:
        _ring(axes, places[list(found).index(best)], value(best, sweep.metric))
    axes.set_ylabel(_label(sweep.metric))
    canvas.dress(axes)
    axes.margins(y=0.12)
    colours.explain(figure, axes, canvas.state_marks(found))
    return figure


def importances(found: Importance | None, dimensions: Sequence[Dimension]) -> Figure | None:
    """Bars of what mattered; None where nothing can be said."""
    if found is None:
        return None
    labels = {dimension.key: dimension.label for dimension in dimensions}
    keys = list(reversed(found.shares))
    figure = canvas.blank(1.2 + 0.4 * len(keys))
    axes = figure.add_subplot()
    bars = axes.barh(
        range(len(keys)), [found.shares[key] for key in keys], color=canvas.shades()(0.0)
    )
    axes.bar_label(bars, fmt="{:.0%}", padding=4)
    axes.set_yticks(range(len(keys)))
    axes.set_yticklabels([labels[key] for key in keys], parse_math=False)
    axes.set_xlim(0, 1.08)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("share of the metric's variance")
    canvas.dress(axes)
    return figure


def value(outcome: Outcome, metric: str) -> float | None:
    """The trial's metric, if it did not fail and the metric is a number."""
    if outcome.status == "failed":
        return None
    found: float | None = getattr(outcome, metric)
    return found if found is not None and math.isfinite(found) else None


def _label(metric: str) -> str:
    unit = " (nats per token)" if metric.endswith("_loss") else ""
    return f"{metric_name(metric)}{unit}"


def _curve(
    axes: Any, curve: Points, outcome: Outcome, colour: Any, marked: bool, best: Outcome | None
) -> None:
    finite = [point for point in curve if math.isfinite(point[1])]
    if not finite:
        return
    steps, losses = zip(*_thinned(finite), strict=True)
    leads = best is not None and outcome.trial_id == best.trial_id
    width = 2.8 if leads else (1.4 if marked else 0.9)
    axes.plot(
        steps,
        losses,
        linestyle=canvas.line_style(outcome.status),
        color=colour,
        linewidth=width,
        alpha=1.0 if leads else 0.8,
        marker="o" if marked and len(steps) <= 40 else None,
        markersize=3,
        zorder=4 if leads else 2,
    )
    if leads:
        axes.annotate(
            "best", (steps[-1], losses[-1]), (5, 0), textcoords="offset points", va="center"
        )
    elif outcome.status == "stopped":
        axes.plot(steps[-1], losses[-1], "o", ms=6, mfc="none", mec=colour, mew=1.4)
    elif outcome.status == "failed":
        axes.plot(steps[-1], losses[-1], "x", ms=7, color=BAD, mew=1.8, zorder=5)


def _thinned(curve: Points) -> Points:
    """At most so many points, the last among them."""
    every = math.ceil(len(curve) / _MOST_POINTS)
    return [*curve[:-1:every], curve[-1]]


def _at_the_edge(axes: Any, place: float, marker: str, edge: Any, inside: Any) -> None:
    """A mark at the upper edge, whatever the losses."""
    where = axes.get_xaxis_transform()
    axes.plot(place, 0.97, marker, mec=edge, mfc=inside, mew=1.8, ms=8, transform=where)


def _ring(axes: Any, place: float, loss: float | None) -> None:
    if loss is None:
        return
    axes.plot(place, loss, "o", ms=17, mfc="none", mec=INK, mew=1.4)
    axes.annotate("best", (place, loss), (12, 0), textcoords="offset points", va="center")
