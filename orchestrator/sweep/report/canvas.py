"""What the pictures share: a figure without a display, colours, marks of states, files."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from orchestrator.sweep.outcome import Outcome
from orchestrator.sweep.report.dimension import Dimension
from orchestrator.sweep.words import shown

# Lines and texts; in a page they take the page's own colour.
INK = "#2b323b"
BAD = "#d64550"
# Of middle lightness, to be seen on white and on black, and told apart by the colour-blind.
_SHADES = LinearSegmentedColormap.from_list(
    "shades", ["#2f7ed8", "#7a63d2", "#c04f9e", "#e8743b", "#e0a100"]
)
_LINES = {"finished": "-", "stopped": "--", "failed": ":"}
_FEW = 8
_WIDTH = 11.0
_GROUP = re.compile(r'<g id="[^"]*"')
# Losses this share above the start's distance to the best leave the picture.
_ROOM = 0.25


def blank(height: float = 4.8) -> Figure:
    """An empty figure of the report's width; sizes in inches."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Any) -> None:
    """Quiet frame and grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)


def line_style(status: str) -> str:
    """How a trial's curve is drawn: a trial that was stopped early is dashed, a failed dotted."""
    return _LINES.get(status, "-.")


def scale_axis(axes: Any, which: str, dimension: Dimension) -> None:
    """Make an axis that of a searched key: its scale, its ticks, its name."""
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}label")(dimension.label, parse_math=False)
    if dimension.log:
        getattr(axes, f"set_{which}scale")("log")
    if dimension.numeric and not dimension.listed:
        if dimension.log:
            _thin_log_ticks(axis, dimension)
        return
    if not dimension.numeric or len(dimension.levels) <= 2 * _FEW:
        places = dimension.levels if dimension.numeric else range(len(dimension.levels))
        axis.set_minor_locator(NullLocator())
        axis.set_major_locator(FixedLocator(list(places)))
        names = [_short(shown(level)) for level in dimension.levels]
        axis.set_ticklabels(names, parse_math=False)


class Colours:
    """Colours of trials by a searched key, with its legend or bar."""

    def __init__(self, dimension: Dimension | None) -> None:
        self._by = dimension
        places = [0.0] if dimension is None else dimension.places()
        low, high = min(places, default=0.0), max(places, default=1.0)
        kind = LogNorm if dimension is not None and dimension.log else Normalize
        self._norm = kind(low, high if high > low else low + 1)
        self._places = places

    def of(self, trial: int) -> Any:
        """The colour of the trial at this place."""
        return _SHADES(0.0 if self._by is None else self._norm(self._places[trial]))

    def explain(self, figure: Figure, axes: Any, states: Sequence[Any]) -> None:
        """A legend of the states and of few values; a colour bar for many."""
        by, handles = self._by, list(states)
        if by is not None and (len(by.levels) <= _FEW or not by.numeric):
            order = dict(zip(by.values, range(len(by.values)), strict=True))
            handles += [
                Line2D([], [], color=self.of(order[v]), linewidth=4, label=_value(by, v))
                for v in by.levels[: 2 * _FEW]
            ]
        elif by is not None:
            bar = figure.colorbar(ScalarMappable(self._norm, _SHADES), ax=axes, pad=0.02)
            bar.set_label(by.label, parse_math=False)
            bar.outline.set_visible(False)
            if by.log:
                _thin_log_ticks(bar.ax.yaxis, by)
        if handles:
            where = {"loc": "outside lower center", "ncols": min(8, len(handles))}
            for text in figure.legend(handles=handles, frameon=False, **where).get_texts():
                text.set_parse_math(False)


def shades() -> Any:
    """The colour map, from small to large."""
    return _SHADES


def state_marks(found: Sequence[Outcome]) -> list[Any]:
    """Legend entries of the states that occur, as points and curves show them."""
    looks: dict[str, dict[str, Any]] = {
        "finished": {"marker": "o"},
        "stopped": {"marker": "o", "markerfacecolor": "none"},
        "failed": {"marker": "x", "color": BAD},
    }
    occurring = {outcome.status for outcome in found}
    return [
        Line2D([], [], **{"color": INK, **look}, linestyle=line_style(status), label=word)
        for status, look in looks.items()
        if status in occurring
        for word in ["stopped early" if status == "stopped" else status]
    ]


def limit_losses(axes: Any, starts: Sequence[float], losses: Sequence[float]) -> None:
    """Keep a loss that ran away from pressing all others flat."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return
    low, high = min(finite), max(finite)
    begun = max((s for s in starts if math.isfinite(s)), default=high)
    most = begun + _ROOM * (begun - low)
    if low < begun and high > most:
        axes.set_ylim(low - 0.05 * (most - low), most)


def high_end(values: Sequence[float], mode: str) -> float:
    """The upper end of an axis: the largest, unless it is a bad one far from the rest."""
    ordered = sorted(values)
    spread = ordered[len(ordered) // 2] - ordered[0]
    if mode == "max" or not spread:
        return ordered[-1]
    return min(ordered[-1], ordered[0] + 4 * spread)


def to_png(figure: Figure, path: Path) -> None:
    """Write the figure with dark ink on white."""
    _ink(figure, [withStroke(linewidth=3, foreground="white")])
    figure.savefig(path, dpi=144, facecolor="white")


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element in the page's own ink; `name` keeps its ids apart."""
    _ink(figure, [])
    stream = io.StringIO()
    # Text as text: small, searchable, and escaped by matplotlib's own XML writer.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    # Names of groups would stand twice in a page; what is referred to has a salted id.
    return _GROUP.sub("<g", text[text.index("<svg") :]).replace(INK, "currentColor")


def _ink(figure: Figure, halo: list[Any]) -> None:
    """One ink for all that is no curve; a halo keeps texts readable over curves."""
    for text in figure.findobj(Text):
        text.set_color(INK)
        text.set_path_effects(halo)
    for axes in figure.axes:
        axes.tick_params(which="both", color=INK, labelcolor=INK, length=3.5, pad=4)
        for spine in axes.spines.values():
            spine.set_edgecolor(INK)


def _thin_log_ticks(axis: Any, dimension: Dimension) -> None:
    """Name more than the powers of ten where the values span less than two of them."""
    numbers = [value for value in dimension.places() if value > 0]
    if numbers and max(numbers) < 100 * min(numbers):
        axis.set_minor_formatter(FuncFormatter(_one_two_five))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _one_two_five(value: float, _: Any) -> str:
    leading = value / 10 ** math.floor(math.log10(value) + 1e-9)
    return f"{value:.3g}" if round(leading, 3) in (2, 5) else ""


def _value(dimension: Dimension, value: Any) -> str:
    return f"{dimension.label} {_short(shown(value))}"


def _short(text: str) -> str:
    return text if len(text) <= 28 else f"{text[:25]}..."
