"""A Ray of the command's own, which serves one run: what Ray Train does for others, left out.

Each of the processes that it has for them wakes a hundred times a second while workers compute, and
takes seconds of a start on two cores.
"""

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.train.v2._internal.constants import ENABLE_CONTROLLER_STRUCTURED_LOGGING_ENV_VAR
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup
from ray.train.v2._internal.logging.logging import SessionFileHandler


class NothingToAskFor(FixedScalingPolicy):  # type: ignore[misc]
    """Ray Train's policy of a fixed number of workers, but that it asks no autoscaler for them.

    Ray Train starts a process that passes such wishes on, before its workers.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Make no wish."""

    def _maybe_send_resource_request(self) -> None:
        return


class _Group(WorkerGroup):  # type: ignore[misc]
    """Workers that know neither a controller, which is no actor, nor Ray Train's barrier.

    Both serve Ray Train's checkpoints, of which ours have none. The barrier's process is there
    before the workers, and ends here.
    """

    def _init_train_context_on_workers(
        self, workers: list[Worker], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        ray.kill(sync_actor)
        told = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=None,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[place] for name, values in train_context_args.items()},
            )
            for place, worker in enumerate(workers)
        ]
        ray.get(told)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):  # type: ignore[misc]
    worker_group_cls = _Group


class Control:
    """Ray Train's controller in a thread of this process."""

    def __init__(self) -> None:
        """It does not run yet."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def run(self, given: dict[str, Any]) -> Any:
        """Run it in this thread, and wait for it.

        Args:
            given: what the controller is made of.

        Returns:
            Ray Train's result.

        Raises:
            asyncio.CancelledError: another thread has ended it.
        """
        with _log_in_session():
            controller = _Controller(**given)
            asyncio.run(self._follow(controller))
            return controller.get_result()

    def end(self) -> None:
        """Let it go no further, before Ray is left: it would begin anew, time and again."""
        if self._loop is not None and self._task is not None:
            # One that has ended meanwhile has closed its loop.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._task.cancel)

    async def _follow(self, controller: _Controller) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        await controller.run()


@contextmanager
def _log_in_session() -> Iterator[None]:
    """Keep what the controller says in Ray's logs; to the user the command has its own words.

    Its own settings of Python's logging would close the handlers of the whole process.
    """
    logger = logging.getLogger("ray.train")
    before = logger.handlers, logger.level, logger.propagate
    handler = SessionFileHandler(f"ray-train-controller-{os.getpid()}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    asked = os.environ.get(ENABLE_CONTROLLER_STRUCTURED_LOGGING_ENV_VAR)
    os.environ[ENABLE_CONTROLLER_STRUCTURED_LOGGING_ENV_VAR] = "0"
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)
        os.environ.pop(ENABLE_CONTROLLER_STRUCTURED_LOGGING_ENV_VAR)
        if asked is not None:
            os.environ[ENABLE_CONTROLLER_STRUCTURED_LOGGING_ENV_VAR] = asked
