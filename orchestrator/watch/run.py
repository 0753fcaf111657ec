"""What the user sees while a run goes on: the journal, followed and shown.

A live line on a terminal, plain lines elsewhere; all on stderr.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from orchestrator.tracking.journal import journal_path, read_events

_POLL_SECONDS = 0.2
# Plain lines come at the first step and then no more often than this.
_LINE_SECONDS = 10.0


class Watch:
    """Follows one run's journal in a thread of its own. A context manager by `watching`."""

    def __init__(self, run_dir: Path, console: Console) -> None:
        self._path, self._console = journal_path(run_dir), console
        self._offset = self._path.stat().st_size if self._path.exists() else 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._total = 0
        self._eval_loss: float | None = None
        self._said = 0.0
        self._live: Progress | None = None
        self._task: TaskID | None = None

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def stop(self) -> None:
        """Show what is left and end."""
        self._done.set()
        self._thread.join(timeout=10)
        if self._live is not None:
            self._live.stop()

    def _follow(self) -> None:
        while True:
            ending = self._done.is_set()
            if self._path.exists():
                for event, offset in read_events(self._path, self._offset):
                    self._offset = offset
                    self._show(event)
            if ending:
                return
            self._done.wait(_POLL_SECONDS)

    def _show(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "start":
            self._begin(event)
        elif kind == "step":
            self._step(event)
        elif kind == "evaluation":
            self._eval_loss = event["eval_loss"]
            self._console.print(
                f"step {event['step']}: eval loss {event['eval_loss']:.4f}, "
                f"perplexity {event['perplexity']:.2f}"
            )
        elif kind == "warning":
            self._console.print(event["message"], markup=False, highlight=False)
        elif kind == "plan":
            self._console.print(
                f"Planned {event['per_gpu_bytes']['total'] / 2**30:.1f} of "
                f"{event['gpu_bytes'] / 2**30:.1f} GiB, {event['tokens_per_pass']} tokens per pass",
                highlight=False,
            )
        elif kind == "data":
            self._console.print(event["summary"], markup=False, highlight=False)

    def _begin(self, event: dict[str, Any]) -> None:
        self._total = event["total_steps"]
        went_on = f", going on after step {event['resumed_from']}" if event["resumed_from"] else ""
        self._console.print(
            f"{event['trainable_parameters']:,} trainable parameters on {event['device']}, "
            f"{event['workers']} worker(s), {self._total} steps{went_on}"
        )
        if self._console.is_terminal and self._live is None:
            self._live = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._live.add_task("", total=self._total)
            self._live.start()
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=event["resumed_from"])

    def _step(self, event: dict[str, Any]) -> None:
        held_out = "" if self._eval_loss is None else f"  eval {self._eval_loss:.4f}"
        text = (
            f"loss {event['loss']:.4f}{held_out}  {event['tokens_per_second']:.0f} tokens/s  "
            f"{event['memory_bytes'] / 2**30:.1f} GiB"
        )
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=event["step"], description=text)
            return
        now, last = time.monotonic(), event["step"] == self._total
        if event["step"] == 1 or last or now - self._said > _LINE_SECONDS:
            self._said = now
            left = (self._total - event["step"]) * event["seconds"]
            self._console.print(
                f"step {event['step']}/{self._total}  {text}  {left / 60:.1f} min left",
                highlight=False,
            )


@contextmanager
def watching(run_dir: Path, console: Console) -> Iterator[None]:
    """Show a run's progress while the block runs."""
    watch = Watch(run_dir, console)
    watch.start()
    try:
        yield
    finally:
        watch.stop()
