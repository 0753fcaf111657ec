"""Delivery of a sweep's trials: each a run of its own, nested in the sweep's."""

import threading
import time
from pathlib import Path

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.delivery import Delivery, Say, count_pending
from orchestrator.tracking.earlier import earlier_job

_LOOK_SECONDS = 1.0


class TrialDeliveries:
    """Follows the trials' journals. `start` it, let the trials write, then `close` it."""

    def __init__(self, job: JobConfig, run_dir: Path, say: Say) -> None:
        self._job, self._run_dir, self._say = job, run_dir, say
        self._deliveries: dict[Path, Delivery] = {}
        self._unreadable: set[Path] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="trial-deliveries")

    def start(self) -> None:
        """Begin in the background."""
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Wait until all is delivered, at most `timeout` seconds for all trials together."""
        end = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout)
        self._look()
        for delivery in self._deliveries.values():
            delivery.close(max(0.1, end - time.monotonic()))

    def _follow(self) -> None:
        while not self._closing.wait(_LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        """Take up the trials that have news, once the run they belong to is there."""
        self._let_go()
        parent = Cursor.peek(self._run_dir)
        if parent is None or parent.run_id is None:
            return
        for path in sorted(self._run_dir.glob("trials/*/journal.jsonl")):
            folder = path.parent
            known = folder in self._deliveries or folder in self._unreadable
            if known or not count_pending(folder, Cursor.peek(folder)):
                continue
            try:
                job = earlier_job(folder, self._job)
            except OrchestratorError as error:
                self._unreadable.add(folder)
                self._say(str(error))
                continue
            delivery = Delivery(job, folder, self._say, parent=parent.run_id)
            self._deliveries[folder] = delivery
            delivery.start()

    def _let_go(self) -> None:
        """End the deliveries of trials that are over: hundreds would each keep a thread."""
        for folder, delivery in list(self._deliveries.items()):
            if delivery.at_rest and not count_pending(folder, Cursor.peek(folder)):
                del self._deliveries[folder]
                delivery.close(_LOOK_SECONDS)
