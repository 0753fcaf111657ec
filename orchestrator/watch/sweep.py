"""What the user sees while a sweep goes on: its trials' journals, followed and shown.

A live table on a terminal, plain lines elsewhere; all on stderr.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.config import JobConfig, SweepConfig
from orchestrator.sweep.words import duration, measured, metric_name, short_labels
from orchestrator.tracking.journal import journal_path, read_events
from orchestrator.watch.trial import ENDED, TrialState

_POLL_SECONDS = 0.5
# Plain lines about one trial's evaluations come no more often than this.
_LINE_SECONDS = 10.0
_BEST_SHOWN = 5
_MOST_RUNNING = 16
_COLOURS = {"finished": "green", "stopped": "yellow", "failed": "red", "running": "cyan"}


class SweepWatch:
    """Follows a sweep's journals in a thread of its own. A context manager by `watching_sweep`."""

    def __init__(
        self,
        job: JobConfig,
        run_dir: Path,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert job.sweep is not None
        self._job, self._run_dir, self._console, self._clock = job, run_dir, console, clock
        self._keys, self._metric = tuple(job.sweep.search_space), job.sweep.metric
        self._mode = job.sweep.mode
        self._total, self._places = trials_at_most(job.sweep), 0
        self._trials: dict[str, TrialState] = {}
        self._said: dict[str, float] = {}
        path = journal_path(run_dir)
        self._offset = path.stat().st_size if path.exists() else 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._live: Live | None = None
        self._began, self._trained_from = clock(), math.inf
        # What earlier commands left is known, but neither told nor counted as this one's work.
        for trial in self._look():
            for _ in trial.news():
                pass
            trial.forget_running()
        self._before = self._work()

    def start(self) -> None:
        """Begin to follow."""
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self.table,
                transient=True,
                refresh_per_second=2,
            )
            self._live.start()
        self._thread.start()

    def stop(self) -> None:
        """Show what is left and end."""
        self._done.set()
        self._thread.join(timeout=10)
        if self._live is not None:
            self._live.stop()

    def poll(self) -> None:
        """Read what is new, and tell it."""
        path = journal_path(self._run_dir)
        if path.exists():
            for event, offset in read_events(path, self._offset):
                self._offset = offset
                self._tell_sweep(event)
        for trial in self._look():
            for event in trial.news():
                self._tell(trial, event)

    def table(self) -> Group:
        """The running trials, the best few of those that ended, and how far the sweep is."""
        table = Table(expand=False, header_style="bold", box=None, pad_edge=False)
        headings = (
            "trial",
            *short_labels(self._keys).values(),
            "step",
            metric_name(self._metric),
            "time",
            "state",
        )
        for heading in headings:
            table.add_column(heading, no_wrap=True, overflow="ellipsis", max_width=32)
        running, best = self._shown()
        for trial in running:
            table.add_row(*self._row(trial))
        if best:
            table.add_row(Text("best so far", style="dim"))
        for trial in best:
            table.add_row(*self._row(trial))
        hidden = sum(t.state in ("running", "waiting") for t in self._in_order()) - len(running)
        more = [Text(f"and {hidden} more", style="dim")] if hidden > 0 else []
        return Group(Text(self.progress()), table, *more)

    def progress(self) -> str:
        """Trials, places and time, in one line."""
        states = [trial.state for trial in self._in_order()]
        ended = [f"{states.count(s)} {s}" for s in ENDED if states.count(s)]
        running = states.count("running")
        places = f"{running}/{self._places} places" if self._places else f"{running} running"
        over = sum(state in ENDED for state in states)
        told = f" ({', '.join(ended)})" if ended else ""
        spent = self._clock() - self._began
        parts = [
            f"{over} of {self._total} trials ended{told}",
            places,
            f"{max(0, self._total - over - running)} to come",
            f"{duration(spent)} spent",
        ]
        left = self._seconds_left(spent) if over < self._total else None
        return ", ".join(parts if left is None else [*parts, f"about {duration(left)} left"])

    def _follow(self) -> None:
        while True:
            ending = self._done.is_set()
            self.poll()
            if ending:
                return
            self._done.wait(_POLL_SECONDS)

    def _look(self) -> list[TrialState]:
        """All trials, new ones too, in the order they began."""
        for path in self._run_dir.glob("trials/*/job.yaml"):
            folder = path.parent
            if folder.name not in self._trials:
                self._trials[folder.name] = TrialState(folder, self._keys)
        return self._in_order()

    def _in_order(self) -> list[TrialState]:
        # A copy: the terminal's own thread asks too.
        return sorted(list(self._trials.values()), key=lambda trial: (trial.began, trial.name))

    def _tell_sweep(self, event: dict[str, Any]) -> None:
        if event["event"] == "places":
            self._places = event["places"]
        elif event["event"] in ("warning", "data"):
            self._print(event.get("message") or event.get("summary") or "")

    def _tell(self, trial: TrialState, event: dict[str, Any]) -> None:
        """A line of what happened; on a terminal the table shows it, but for what went wrong."""
        kind, name = event["event"], trial.name
        if kind == "start":
            self._trained_from = min(self._trained_from, self._clock())
        if kind == "warning":
            self._print(f"trial {name}: {event['message']}")
        elif kind == "finish" and event["status"] == "failed":
            self._print(f"trial {name} failed: {event['error']}. {self.progress()}")
        elif self._live is not None:
            return
        elif kind == "start":
            resumed = event["resumed_from"]
            went_on = f" goes on after step {resumed}" if resumed else " begins"
            self._print(f"trial {name}{went_on}: {trial.described()}")
        elif kind == "evaluation" and event["step"] > 0:
            self._tell_loss(trial)
        elif kind == "finish":
            loss = f", {self._loss(trial)}" if self._loss(trial) else ""
            self._print(
                f"trial {name} {event['status']} after {trial.step} steps{loss}. {self.progress()}"
            )

    def _tell_loss(self, trial: TrialState) -> None:
        now = self._clock()
        if now - self._said.get(trial.name, -math.inf) < _LINE_SECONDS:
            return
        self._said[trial.name] = now
        self._print(f"trial {trial.name} step {trial.step}/{trial.total}: {self._loss(trial)}")

    def _loss(self, trial: TrialState) -> str:
        loss = trial.latest(self._metric)
        return "" if loss is None else f"{metric_name(self._metric)} {measured(loss)}"

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _shown(self) -> tuple[list[TrialState], list[TrialState]]:
        """As many as the terminal has lines for: the best of those that ended, the rest running."""
        trials = self._in_order()
        reached = {t.name: t.latest(self._metric) for t in trials if t.state in ENDED}
        known = {name: v for name, v in reached.items() if v is not None and math.isfinite(v)}
        # Those that were trained to their end first: a stopped trial was not the better one.
        ended = [trial for trial in trials if trial.name in known]
        sign = -1 if self._mode == "max" else 1
        ended.sort(key=lambda trial: (trial.state != "finished", sign * known[trial.name]))
        running = [t for t in trials if t.state == "running"]
        waiting = [t for t in trials if t.state == "waiting"]
        room = max(4, min(_MOST_RUNNING, self._console.size.height - _BEST_SHOWN - 6))
        return (running + waiting)[:room], ended[:_BEST_SHOWN]

    def _row(self, trial: TrialState) -> list[Text]:
        loss = trial.latest(self._metric)
        step = f"{trial.step}/{trial.total}" if trial.total else str(trial.step)
        return [
            Text(trial.name),
            *(Text(trial.params.get(key, "")) for key in self._keys),
            Text(step),
            Text(measured(loss)),
            Text(duration(trial.seconds)),
            Text(trial.state, style=_COLOURS.get(trial.state, "dim")),
        ]

    def _work(self) -> float:
        """Trials done, parts of them too."""
        return sum(trial.done for trial in self._in_order())

    def _seconds_left(self, spent: float) -> float | None:
        """From what was done since the first trial began; never beyond the time budget."""
        assert self._job.sweep is not None
        work = self._work() - self._before
        budget = self._job.sweep.time_budget
        left = None if budget is None else max(0.0, budget - spent)
        if work <= 0:
            return left
        took = self._clock() - self._trained_from
        estimate = max(0.0, self._total - self._work()) * took / work
        return estimate if left is None else min(estimate, left)


@contextmanager
def watching_sweep(job: JobConfig, run_dir: Path, console: Console) -> Iterator[None]:
    """Show a sweep's progress while the block runs."""
    watch = SweepWatch(job, run_dir, console)
    watch.start()
    try:
        yield
    finally:
        watch.stop()


def trials_at_most(sweep: SweepConfig) -> int:
    """How many trials the sweep has: a grid's points, or as many as it may try."""
    if sweep.searcher == "grid":
        return math.prod(len(next(iter(domain.values()))) for domain in sweep.search_space.values())
    return sweep.trials
