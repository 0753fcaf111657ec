"""A thread that replays a run's journal to MLflow, however long MLflow is away.

Everything it does can be done twice with the same result: metrics carry the journal's own times
and steps, runs are found again by a key of ours, uploads overwrite themselves.
"""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError, first_line
from orchestrator.tracking import values
from orchestrator.tracking.client import complaint, connect
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.journal import journal_path, read_events
from orchestrator.tracking.secrets import redact
from orchestrator.tracking.store import tracking_uri

Say = Callable[[str], None]
_POLL_SECONDS = 1.0
_LOOK_SECONDS = 0.1
_LONGEST_PAUSE = 30.0
_BATCH = 100
# One refused connection may be a proxy's hiccup; the user hears of the second in a row.
_FAILURES_BEFORE_WORD = 2


@dataclass(frozen=True)
class DeliveryReport:
    """What reached MLflow. `pending` counts the events that did not."""

    run_id: str | None
    model_version: str | None
    pending: int


class Delivery:
    """Delivers one run's journal. `start` it, let the run write, then `close` it.

    MLflow is imported when the first event is there: until then the training process imports its
    own libraries, and two threads in one library's imports can trip over each other.
    """

    def __init__(
        self,
        job: JobConfig,
        run_dir: Path,
        say: Say,
        patient: bool = True,
        parent: str | None = None,
    ) -> None:
        """Of one run.

        Args:
            job: names the store, the experiment and the model.
            run_dir: holds the journal.
            say: is told what the user should know.
            patient: try until `close`; otherwise end as soon as MLflow is known to be away.
            parent: id of the sweep's run that a trial's is nested in. The sweep's own delivery says
                for all of its trials when MLflow is away.
        """
        self._job, self._run_dir, self._say, self._patient = job, run_dir, say, patient
        self._parent = parent
        self._store = redact(tracking_uri(job))
        self._cursor: Cursor | None = None
        self._replay: Any = None
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._failures = 0
        self._told = self._at_rest = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow-delivery")

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once it is known."""
        return self._cursor.run_id if self._cursor else None

    @property
    def away(self) -> bool:
        """Whether the user was told that MLflow is away, and it has not come back since."""
        return self._told

    @property
    def at_rest(self) -> bool:
        """Whether the last event that was delivered is the run's last word."""
        return self._at_rest

    def start(self) -> None:
        """Begin in the background, if it has not begun."""
        if self._thread.ident is None:
            self._thread.start()

    def catch_up(self, timeout: float) -> DeliveryReport:
        """Wait until what the journal holds by now is delivered, at most `timeout` seconds.

        Returns at once where MLflow is known to be away; delivery goes on.
        """
        end = time.monotonic() + timeout
        while self._thread.is_alive() and not self._told and time.monotonic() < end:
            if not count_pending(self._run_dir, self._cursor):
                break
            time.sleep(_LOOK_SECONDS)
        pending = count_pending(self._run_dir, self._cursor)
        if self._cursor is None:
            return DeliveryReport(None, None, pending)
        return DeliveryReport(self._cursor.run_id, self._cursor.model_version, pending)

    def close(self, timeout: float) -> DeliveryReport:
        """Wait until all is delivered, at most `timeout` seconds.

        What is left stays in the journal, and the user is told.
        """
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        # A command that was refused before it began has a word for MLflow too.
        self.start()
        self._thread.join(timeout)
        # Where another delivery of this run holds the lock, its cursor tells what is done.
        cursor = self._cursor or Cursor.peek(self._run_dir)
        pending = count_pending(self._run_dir, cursor)
        if pending and self._parent is None:
            self._say(
                f"{pending} events of {self._job.name} wait in {journal_path(self._run_dir)} for "
                "MLflow; the next command over this output_dir delivers them"
            )
        if cursor is None:
            return DeliveryReport(None, None, pending)
        return DeliveryReport(cursor.run_id, cursor.model_version, pending)

    def _work(self) -> None:
        try:
            with self._alone():
                self._follow()
        except Timeout:
            # Another thread or command delivers this run; `close` counts what it has left.
            return
        except OrchestratorError as error:
            self._say(redact(str(error)))
        except Exception as error:
            # Tracking never ends a training run; the user hears of it, the journal keeps all.
            self._say(f"Delivery to MLflow stopped: {type(error).__name__}: {redact(str(error))}")

    def _alone(self) -> Any:
        """The lock of this run's delivery: two at once could each make an MLflow run."""
        lock = FileLock(self._run_dir / ".delivery.lock")
        while True:
            try:
                return lock.acquire(timeout=_POLL_SECONDS)
            except Timeout:
                done = self._closing.is_set() and not count_pending(
                    self._run_dir, Cursor.peek(self._run_dir)
                )
                if done or time.monotonic() > self._deadline:
                    raise

    def _follow(self) -> None:
        self._cursor = Cursor.load(self._run_dir)
        while True:
            # Read before delivering: what was written before `close` is then seen.
            closing = self._closing.is_set()
            try:
                self._deliver()
                self._tell_back()
                pause = _POLL_SECONDS
            except Exception as error:
                if (word := complaint(error)) is None:
                    raise
                self._tell_away(word, error)
                if self._told and not self._patient:
                    return
                pause = min(0.5 * 2**self._failures, _LONGEST_PAUSE)
                if closing:
                    pause = min(pause, _POLL_SECONDS)
                    if time.monotonic() + pause < self._deadline:
                        time.sleep(pause)
                        continue
            if closing:
                return
            self._closing.wait(pause)

    def _deliver(self) -> None:
        """Everything that stands in the journal now."""
        path = journal_path(self._run_dir)
        while path.exists() and time.monotonic() < self._deadline:
            cursor, size = self._cursor or Cursor.load(self._run_dir), path.stat().st_size
            if cursor.over(self._store, size).offset == size:
                return
            if self._replay is None:
                self._replay = self._open(cursor, path)
                cursor = self._replay.cursor
            batch = list(islice(read_events(path, cursor.offset), _BATCH))
            if not batch:
                return
            try:
                self._replay.deliver([event for event, _ in batch])
                self._replay.cursor = self._replay.cursor.moved(batch[-1][1])
                self._replay.cursor.save(self._run_dir)
                self._at_rest = batch[-1][0]["event"] == "finish"
            finally:
                self._cursor = self._replay.cursor

    def _open(self, cursor: Cursor, path: Path) -> Any:
        """The run in MLflow, found again or made."""
        client = connect(self._job)
        from orchestrator.tracking.replay import Replay
        from orchestrator.tracking.runs import find_or_create, still_there

        store = self._store
        cursor = cursor.over(store, path.stat().st_size)
        if cursor.run_id is not None and not still_there(client, cursor.run_id):
            cursor = cursor.afresh(store)
        if cursor.run_id is None:
            first = next(read_events(path), None)
            started = values.milliseconds(first[0]) if first else int(time.time() * 1000)
            run_id = find_or_create(client, self._job, cursor.run_key, started, self._parent)
            cursor = replace(cursor, run_id=run_id)
        cursor.save(self._run_dir)
        self._cursor = cursor
        return Replay(client, self._job, self._run_dir, cursor)

    def _tell_away(self, word: str, error: Exception) -> None:
        self._failures += 1
        if self._failures >= _FAILURES_BEFORE_WORD and not self._told:
            self._told = True
            if self._parent is None:
                self._say(
                    f"MLflow {word} ({redact(first_line(error))[:200]}); training goes on, and the "
                    "journal keeps everything for it"
                )

    def _tell_back(self) -> None:
        self._failures = 0
        if self._told and not count_pending(self._run_dir, self._cursor):
            self._told = False
            if self._parent is None:
                self._say("MLflow answers again; what had waited is delivered")


def deliver_pending(job: JobConfig, run_dir: Path, say: Say, timeout: float) -> None:
    """Deliver what earlier commands over this output_dir left in their journals.

    Args:
        job: the present job; the password of its tracking URI serves earlier runs there too.
        run_dir: the present job's run folder, whose lock the caller holds.
        say: is told what happens.
        timeout: seconds for all runs together.
    """
    from orchestrator.tracking.earlier import earlier_job, is_finished

    end = time.monotonic() + timeout
    silent: set[str] = set()
    for path in sorted(run_dir.parent.glob("*/journal.jsonl")):
        folder = path.parent
        if time.monotonic() > end:
            return
        try:
            if not any(map(_waits, (folder, *_trials(folder)))):
                continue
            own = folder == run_dir
            if own and not is_finished(path):
                # A run that goes on delivers its own journal.
                continue
            with nullcontext() if own else FileLock(folder / ".lock", blocking=False):
                earlier = job if own else earlier_job(folder, job)
                store = tracking_uri(earlier)
                # Who waited once for a store that is away does not wait again for each run.
                if store not in silent and not _deliver_now(earlier, folder, say, end):
                    silent.add(store)
        except (Timeout, OSError):
            # Another command is at work on it, or it is another user's.
            continue
        except OrchestratorError as error:
            say(redact(str(error)))


def count_pending(run_dir: Path, cursor: Cursor | None) -> int:
    """Events of the run's journal that MLflow has not got."""
    path = journal_path(run_dir)
    offset = cursor.offset if cursor else 0
    return sum(1 for _ in read_events(path, offset)) if path.exists() else 0


def _waits(folder: Path) -> bool:
    return count_pending(folder, Cursor.peek(folder)) > 0


def _trials(folder: Path) -> list[Path]:
    """The folders of a sweep's trials; none of a fine-tune's."""
    return sorted(path.parent for path in folder.glob("trials/*/journal.jsonl"))


def _deliver_now(job: JobConfig, folder: Path, say: Say, end: float) -> bool:
    """Deliver a run, and a sweep's trials after it; returns whether MLflow answered."""
    from orchestrator.tracking.earlier import earlier_job

    if _waits(folder) and not _deliver_one(job, folder, say, end):
        return False
    own = Cursor.peek(folder)
    if own is None or own.run_id is None:
        return True
    for trial in filter(_waits, _trials(folder)):
        if not _deliver_one(earlier_job(trial, job), trial, say, end, own.run_id):
            return False
    return True


def _deliver_one(
    job: JobConfig, folder: Path, say: Say, end: float, parent: str | None = None
) -> bool:
    """Whether MLflow answered."""
    delivery = Delivery(job, folder, say, patient=False, parent=parent)
    delivery.start()
    delivery.close(max(0.0, end - time.monotonic()))
    return not delivery.away
