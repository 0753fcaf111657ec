"""The report of a sweep: a page, pictures and a table, made from the trials' outcomes.

Knows neither Ray nor MLflow; draws without a display and reads nothing but what it is given.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from orchestrator.config import JobConfig
from orchestrator.places import write_whole
from orchestrator.sweep.outcome import Outcome
from orchestrator.sweep.report.page import Picture, Winner, render
from orchestrator.sweep.report.table import mlflow_table

PAGE = "report.html"
TABLE = "trials.json"


def write_report(
    job: JobConfig,
    folder: Path,
    found: Sequence[Outcome],
    winner: Winner | None,
    seconds: float,
) -> Path:
    """Write report.html, the pictures as PNG files, and trials.json as MLflow shows tables.

    Args:
        job: the sweep's resolved job.
        folder: where the files go.
        found: every trial, in the order they were proposed.
        winner: the best of them; None where none was trained to its end.
        seconds: that the sweep took, over all commands.

    Returns:
        The page.
    """
    # A second of imports that a sweep's start can do without.
    from orchestrator.sweep.report import canvas
    from orchestrator.sweep.report.pictures import drawn

    assert job.sweep is not None
    folder.mkdir(parents=True, exist_ok=True)
    best = None if winner is None else winner.outcome
    pictures = []
    for name, title, caption, figure in drawn(job.sweep, found, best):
        canvas.to_png(figure, folder / f"{name}.png")
        pictures.append(Picture(title, caption, canvas.to_svg(figure, name)))
    keys, sweep = tuple(job.sweep.search_space), job.sweep
    table = mlflow_table(found, keys, sweep.metric, sweep.mode)
    write_whole(folder / TABLE, json.dumps(table, indent=1))
    write_whole(folder / PAGE, render(job, found, winner, pictures, seconds))
    return folder / PAGE
