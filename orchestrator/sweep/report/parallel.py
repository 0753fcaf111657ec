"""Parallel coordinates: every trial a line across its searched values to its metric."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from orchestrator.config import SweepConfig
from orchestrator.sweep.outcome import Outcome
from orchestrator.sweep.report import canvas
from orchestrator.sweep.report.canvas import BAD
from orchestrator.sweep.report.dimension import Dimension
from orchestrator.sweep.report.figures import value
from orchestrator.sweep.words import metric_name

_MARGIN = 0.06


def parallel_coordinates(
    found: Sequence[Outcome],
    dimensions: Sequence[Dimension],
    sweep: SweepConfig,
    best: Outcome | None,
) -> Figure | None:
    """The figure; None where no trial has a metric. A failed trial's line ends before it."""
    values = [value(outcome, sweep.metric) for outcome in found]
    known = [reached for reached in values if reached is not None]
    if not dimensions or not known:
        return None
    columns = len(dimensions)
    figure = canvas.blank()
    host = figure.add_subplot()
    host.set(xlim=(0, columns), ylim=(0, 1), xticks=[], yticks=[])
    host.spines[:].set_visible(False)
    heights = [_column(host, place, d, columns) for place, d in enumerate(dimensions)]
    # Good trials stand close together; a loss that ran away is drawn at the edge.
    low, high = min(known), canvas.high_end(known, sweep.mode)
    _axis(host, columns, columns, metric_name(sweep.metric), (low, high), False)
    for number, (outcome, reached) in enumerate(zip(found, values, strict=True)):
        line = [column[number] for column in heights]
        if reached is None:
            host.plot(range(columns), line, ":", color=BAD, linewidth=1.2)
            host.plot(columns - 1, line[-1], "x", color=BAD, ms=7)
            continue
        share = min(1.0, (reached - low) / (high - low)) if high > low else 0.0
        leads = best is not None and outcome.trial_id == best.trial_id
        host.plot(
            range(columns + 1),
            [*line, _inside(share)],
            linestyle=canvas.line_style(outcome.status),
            color=canvas.shades()(share if sweep.mode == "min" else 1 - share),
            linewidth=3.0 if leads else 1.3,
            alpha=1.0 if leads or outcome.status == "finished" else 0.6,
            zorder=4 if leads else 2,
        )
    figure.legend(
        handles=canvas.state_marks(found), frameon=False, loc="outside lower center", ncols=3
    )
    return figure


def _column(host: Any, place: int, dimension: Dimension, columns: int) -> list[float]:
    """Draw one key's axis; returns each trial's height on it, from 0 to 1."""
    spots = dimension.places()
    low, high = min(spots), max(spots)
    axis = _axis(host, place, columns, dimension.label, (low, high), dimension.log)
    canvas.scale_axis(axis, "y", dimension)
    _span(axis, low, high, dimension.log)
    axis.set_ylabel("")
    if high == low:
        return [0.5] * len(spots)
    spaced = [math.log(spot) if dimension.log else spot for spot in spots]
    low, high = min(spaced), max(spaced)
    return [_inside((spot - low) / (high - low)) for spot in spaced]


def _axis(
    host: Any, place: int, columns: int, label: str, bounds: tuple[float, float], log: bool
) -> Any:
    """A vertical axis with a scale of its own."""
    axis = host.twinx()
    axis.spines[["top", "bottom", "left"]].set_visible(False)
    axis.spines["right"].set_position(("axes", place / columns))
    if log:
        axis.set_yscale("log")
    _span(axis, *bounds, log)
    axis.annotate(
        label, (place / columns, 1.02), xycoords="axes fraction", ha="center", parse_math=False
    )
    return axis


def _span(axis: Any, low: float, high: float, log: bool) -> None:
    """Let the values fill the axis but for its margins, as `_inside` does."""
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    share = _MARGIN / (1 - 2 * _MARGIN)
    if log:
        room = (high / low) ** share
        axis.set_ylim(low / room, high * room)
    else:
        room = (high - low) * share
        axis.set_ylim(low - room, high + room)


def _inside(share: float) -> float:
    return _MARGIN + (1 - 2 * _MARGIN) * share
