"""Pictures and tables made from a journal's events. Knows nothing of MLflow."""

from collections.abc import Sequence
from typing import Any

Events = Sequence[dict[str, Any]]
_MEASURED = ("peak_memory_bytes", "tokens_per_second")
_COLUMNS = ("index", "prompt", "reference", "before", "after")


def loss_curve(events: Events, title: str) -> Any:
    """A figure of training and eval loss over steps; None before the first step."""
    steps = [(e["step"], e["loss"]) for e in events if e["event"] == "step"]
    held_out = [(e["step"], e["eval_loss"]) for e in events if e["event"] == "evaluation"]
    if not steps:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*steps, strict=True), label="training loss", linewidth=1, color="tab:blue")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), label="eval loss", marker="o", color="tab:orange")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    # A dollar sign in a run's name is no formula.
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def sample_table(events: Events) -> dict[str, Any] | None:
    """Answers before and after, as MLflow lays tables out; None where there are none."""
    rows: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "sample":
            row = rows.setdefault(event["index"], dict.fromkeys(_COLUMNS))
            row.update({name: event.get(name) for name in ("index", "prompt", "reference")})
            row[event["when"]] = event.get("answer")
    if not rows:
        return None
    data = [[row[name] for name in _COLUMNS] for _, row in sorted(rows.items())]
    return {"columns": list(_COLUMNS), "data": data}


def planned_and_measured(events: Events) -> dict[str, Any] | None:
    """The newest plan beside what was then measured; None where nothing was planned."""
    plans = [event for event in events if event["event"] == "plan"]
    if not plans:
        return None
    planned = {name: value for name, value in plans[-1].items() if name not in ("event", "time")}
    ends = [event for event in events if event["event"] == "finish" and event.get(_MEASURED[0])]
    measured = {name: ends[-1][name] for name in _MEASURED if name in ends[-1]} if ends else {}
    return {"planned": planned, "measured": measured}
