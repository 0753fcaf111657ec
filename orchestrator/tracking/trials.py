"""Delivery of a sweep's trials: each a run of its own, nested in the sweep's."""

import threading
import time
from pathlib import Path

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.delivery import Delivery, Say, count_pending
from orchestrator.tracking.earlier import earlier_job, in_store
from orchestrator.tracking.secrets import redact
from orchestrator.tracking.store import tracking_uri

_LOOK_SECONDS = 1.0


class TrialDeliveries:
    """Follows the trials' journals. `start` it, let the trials write, then `close` it."""

    def __init__(self, job: JobConfig, run_dir: Path, say: Say) -> None:
        self._job, self._run_dir, self._say = job, run_dir, say
        self._uri = tracking_uri(job)
        self._store = redact(self._uri)
        self._deliveries: dict[Path, Delivery] = {}
        self._unreadable: set[Path] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="trial-deliveries")

    def start(self) -> None:
        """Begin in the background, if it has not begun."""
        if self._thread.ident is None:
            self._thread.start()

    def close(self, timeout: float) -> None:
        """Wait until all is delivered, at most `timeout` seconds for all trials together."""
        end = time.monotonic() + timeout
        self._closing.set()
        self.start()
        self._thread.join(timeout)
        self._look()
        left = 0
        for delivery in self._deliveries.values():
            left += delivery.close(max(0.1, end - time.monotonic())).pending
        if left:
            self._say(
                f"{left} events of trials wait in {self._run_dir / 'trials'} for MLflow; the next "
                "command over this output_dir delivers them"
            )

    def _follow(self) -> None:
        while not self._closing.wait(_LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        """Take up the trials that have news, once the run they belong to is there."""
        self._let_go()
        parent = Cursor.peek(self._run_dir)
        if parent is None or parent.run_id is None or parent.store != self._store:
            return
        for path in sorted(self._run_dir.glob("trials/*/journal.jsonl")):
            folder = path.parent
            known = folder in self._deliveries or folder in self._unreadable
            if known or not self._has_news(folder):
                continue
            try:
                job = in_store(earlier_job(folder, self._job), self._uri)
            except OrchestratorError as error:
                self._unreadable.add(folder)
                self._say(str(error))
                continue
            delivery = Delivery(job, folder, self._say, parent=parent.run_id)
            self._deliveries[folder] = delivery
            delivery.start()

    def _has_news(self, folder: Path) -> bool:
        """Whether the sweep's store lacks some of a trial, or all of it: it may be another now."""
        cursor = Cursor.peek(folder)
        moved = cursor is not None and cursor.store not in (None, self._store)
        return moved or count_pending(folder, cursor) > 0

    def _let_go(self) -> None:
        """End the deliveries of trials that are over: hundreds would each keep a thread."""
        for folder, delivery in list(self._deliveries.items()):
            if delivery.at_rest and not count_pending(folder, Cursor.peek(folder)):
                del self._deliveries[folder]
                delivery.close(_LOOK_SECONDS)
