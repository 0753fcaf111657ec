"""A thread that replays a run's journal to MLflow, however long MLflow is away.

Everything it does can be done twice with the same result: metrics carry the journal's own times
and steps, runs are found again by a key of ours, uploads overwrite themselves.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError
from orchestrator.jobfile import load_job
from orchestrator.places import journal_path
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.journal import read_events
from orchestrator.tracking.secrets import redact

Say = Callable[[str], None]
_POLL_SECONDS = 1.0
_LONGEST_PAUSE = 30.0
# Events of one batch; a step has ten metrics at most and MLflow takes a thousand at a time.
_BATCH = 90


@dataclass(frozen=True)
class DeliveryReport:
    """What reached MLflow. `pending` counts the events that did not."""

    run_id: str | None
    model_version: str | None
    pending: int


class Delivery:
    """Delivers one run's journal. `start` it, let the run write, then `close` it."""

    def __init__(self, job: JobConfig, run_dir: Path, say: Say) -> None:
        self._job, self._run_dir, self._say = job, run_dir, say
        self._cursor = Cursor.load(run_dir)
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow-delivery")
        self._client: Any = None
        self._down = False

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once it is known."""
        return self._cursor.run_id

    def start(self) -> None:
        """Begin in the background."""
        self._thread.start()

    def close(self, timeout: float) -> DeliveryReport:
        """Wait until all is delivered, at most `timeout` seconds.

        What is left stays in the journal, and the user is told.
        """
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout + 1)
        pending = _pending(self._run_dir, self._cursor)
        if pending:
            self._say(
                f"{pending} events of {self._job.name} wait in {journal_path(self._run_dir)} for "
                "MLflow; the next command over this output_dir delivers them"
            )
        return DeliveryReport(self._cursor.run_id, self._cursor.model_version, pending)

    def _work(self) -> None:
        pause = _POLL_SECONDS
        while True:
            closing = self._closing.is_set()
            try:
                self._deliver()
                if self._down:
                    self._say("MLflow answers again; what had waited is delivered")
                    self._down = False
                pause = _POLL_SECONDS
            except _transient_errors() as error:
                self._tell_down(error)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except Exception as error:
                # Tracking never ends a training run; the user hears of it, the journal keeps all.
                self._say(
                    f"Delivery to MLflow stopped: {type(error).__name__}: {redact(str(error))}"
                )
                return
            whole = not _pending(self._run_dir, self._cursor)
            if closing and (whole or time.monotonic() > self._deadline):
                return
            if closing:
                time.sleep(min(1.0, max(0.0, self._deadline - time.monotonic())))
            else:
                self._closing.wait(pause)

    def _tell_down(self, error: Exception) -> None:
        if not self._down:
            self._down = True
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._say(
                f"MLflow does not answer ({redact(first)[:200]}); training goes on, and the "
                "journal keeps everything for it"
            )

    def _deliver(self) -> None:
        path = journal_path(self._run_dir)
        if not path.exists():
            return
        from orchestrator.tracking.runs import MlflowRun, connect

        while time.monotonic() < self._deadline:
            batch = list(islice(read_events(path, self._cursor.offset), _BATCH))
            if not batch:
                return
            if self._client is None:
                self._client = connect(self._job)
            run = MlflowRun(self._client, self._job, self._run_dir, self._cursor)
            self._cursor = run.replay([event for event, _ in batch]).moved(batch[-1][1])
            self._cursor.save(self._run_dir)


def deliver_pending(job: JobConfig, run_dir: Path, say: Say, timeout: float) -> None:
    """Deliver what earlier commands over this output_dir left in their journals.

    Args:
        job: the present job; its tracking URI serves the runs that were made with it.
        run_dir: the present job's run folder, whose lock the caller holds.
        say: is told what happens.
        timeout: seconds for all runs together.
    """
    end = time.monotonic() + timeout
    for folder in sorted(path.parent for path in run_dir.parent.glob("*/journal.jsonl")):
        if time.monotonic() > end or not _pending(folder, Cursor.load(folder)):
            continue
        if folder == run_dir:
            _deliver_now(job, folder, say, end)
            continue
        try:
            with FileLock(folder / ".lock", blocking=False):
                _deliver_now(_earlier_job(folder, job), folder, say, end)
        except (Timeout, OrchestratorError):
            # Another command is at work on it, or its job file is gone: not ours to deliver.
            continue


def _deliver_now(job: JobConfig, folder: Path, say: Say, end: float) -> None:
    delivery = Delivery(job, folder, say)
    delivery.start()
    delivery.close(max(1.0, end - time.monotonic()))


def _earlier_job(folder: Path, job: JobConfig) -> JobConfig:
    """The job a run was made with; a password that its file does not keep comes from `job`."""
    earlier = load_job(folder / "job.yaml")
    kept, own = earlier.tracking.uri, job.tracking.uri
    if kept is not None and own is not None and redact(own) == kept:
        return earlier.model_copy(
            update={"tracking": earlier.tracking.model_copy(update={"uri": own})}
        )
    return earlier


def _pending(run_dir: Path, cursor: Cursor) -> int:
    path = journal_path(run_dir)
    return sum(1 for _ in read_events(path, cursor.offset)) if path.exists() else 0


def _transient_errors() -> tuple[type[Exception], ...]:
    """What a server or database that is away raises; known once MLflow is imported."""
    import sys

    mlflow = sys.modules.get("mlflow.exceptions")
    database = sys.modules.get("sqlalchemy.exc")
    return (
        OSError,
        *([mlflow.MlflowException] if mlflow else []),
        *([database.OperationalError] if database else []),
    )
