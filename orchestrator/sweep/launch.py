"""Engines at work: their Ray Train run in the background, and the desk where trials meet them."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from orchestrator.cluster.driver import end_controllers, run_workers
from orchestrator.cluster.plan import WorkerPlan
from orchestrator.cluster.session import Session
from orchestrator.config import JobConfig
from orchestrator.sweep.background import Background
from orchestrator.sweep.desk import open_desk
from orchestrator.sweep.engine import serve

_ANSWER_SECONDS = 120.0
_END_SECONDS = 120.0
_AGAIN_SECONDS = 10.0
# For who has asked twice: what is not saved by then is done again by the next command.
_HURRIED_SECONDS = 3.0


class RunningEngine:
    """A Ray Train run for trials. A context manager: none of its processes is left behind."""

    def __init__(
        self,
        job: JobConfig,
        folder: Path,
        plan: WorkerPlan,
        here: Session,
        say: Callable[[str], None],
        places: int,
        apart: bool,
        output_dir: Path,
    ) -> None:
        """Start it.

        Args:
            job: what it trains, or the base and data of its trials.
            folder: of its journal.
            plan: how many workers, with what each.
            here: the session.
            say: is told what the user should know.
            places: trials at a time.
            apart: whether each worker is an engine of its own with its part of the trials.
            output_dir: the sweep's; machines share quantized bases in it.
        """
        self.desk = open_desk(places)
        more = {
            "desk": self.desk,
            "trials": places,
            "apart": apart,
            "output_dir": str(output_dir),
        }
        self._run = Background(
            lambda: run_workers(job, folder, plan, here, say, serve, more),
            lambda: ray.get(self.desk.engine_ended.remote(), timeout=_ANSWER_SECONDS),
        )

    @property
    def ended(self) -> bool:
        """Whether nobody trains any more."""
        return self._run.ended

    def result(self) -> dict[str, Any]:
        """What the engine came to, once it has ended.

        Raises:
            OrchestratorError: the engine failed, or the user stopped it.
        """
        return dict(self._run.result())

    def close(self, best: Path | None) -> dict[str, Any]:
        """Wait for the engine's end; it proves the best trial's adapter.

        Raises:
            OrchestratorError: the engine failed, or the adapter is not what was trained.
        """
        while not self.ended:
            # Said again and again, for a desk that died and came back knows nothing of it.
            ray.get(self.desk.close.remote(best), timeout=_ANSWER_SECONDS)
            self._run.wait(_AGAIN_SECONDS)
        return self.result()

    def __enter__(self) -> "RunningEngine":
        try:
            # The engine's processes start meanwhile.
            ray.get(self.desk.ready.remote(), timeout=_ANSWER_SECONDS)
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        patience = _END_SECONDS
        if kind is KeyboardInterrupt:
            patience = _HURRIED_SECONDS
            end_controllers()
        # Whoever leaves Ray while the engine still starts would start Ray anew from its thread.
        with suppress(ray.exceptions.RayError, TimeoutError):
            ray.get(self.desk.close.remote(None), timeout=patience)
        self._run.wait(patience)
        ray.kill(self.desk)
