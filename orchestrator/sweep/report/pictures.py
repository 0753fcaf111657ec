"""Which pictures a sweep has, with what is to be said of each. Pure."""

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from orchestrator.config import SweepConfig
from orchestrator.sweep.outcome import Outcome
from orchestrator.sweep.report import figures
from orchestrator.sweep.report.dimension import Dimension, across, dimensions
from orchestrator.sweep.report.importance import Importance, importance
from orchestrator.sweep.report.parallel import parallel_coordinates
from orchestrator.sweep.words import metric_name


def drawn(
    sweep: SweepConfig, found: Sequence[Outcome], best: Outcome | None
) -> Iterator[tuple[str, str, str, Figure]]:
    """File name, title, caption and figure of each picture that there is something to draw in."""
    axes, metric = dimensions(sweep, found), sweep.metric
    weights = importance(axes, found, metric)
    over, by = across(axes)
    title = f"{metric_name(metric).capitalize()} over {over.label if over else 'nothing'}"
    yield from _present(
        (
            "loss_curves",
            "Loss curves",
            "Training loss of every step and eval loss of every evaluation"
            + (f", coloured by {over.label}." if over else "."),
            figures.loss_curves(found, axes, best),
        ),
        (
            f"{metric}_over_{over.label if over else 'nothing'}".replace(".", "_"),
            title,
            _over_caption(metric, over, by),
            figures.metric_over(found, axes, sweep, best),
        ),
        (
            "parallel_coordinates",
            "Parallel coordinates",
            "Each line is a trial, from its values to what it came to; the best is the thick one.",
            parallel_coordinates(found, axes, sweep, best),
        ),
        (
            "importance",
            "Importance of the searched keys",
            _importance_caption(weights),
            figures.importances(weights, axes),
        ),
    )


def _present(
    *pictures: tuple[str, str, str, Figure | None],
) -> Iterator[tuple[str, str, str, Figure]]:
    for name, title, caption, figure in pictures:
        if figure is not None:
            yield name, title, caption, figure


def _over_caption(metric: str, over: Dimension | None, by: Dimension | None) -> str:
    coloured = f", coloured by {by.label}" if by else ""
    where = f"over {over.label}{coloured}" if over else ""
    return (
        f"Each trial's last {metric_name(metric)} {where}. Trials that were stopped early trained "
        "less than the others. At the upper edge: failed ones (x), and what lies far above the "
        "rest (triangles)."
    )


def _importance_caption(found: Importance | None) -> str:
    if found is None:
        return ""
    where = f" at step {found.step}, the last that all of them reached" if found.step else ""
    few = " So few trials tell little." if found.trials < 10 else ""
    return f"Functional ANOVA by Optuna over {found.trials} trials{where}.{few}"
