"""A Ray of the command's own, which serves one run: what Ray Train does for others, left out.

Each of the processes that it would start for them takes seconds of a start on two cores, and wakes
a hundred times a second from then on.
"""

import asyncio
import logging
from typing import Any

import ray
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup


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

    Both serve Ray Train's checkpoints, of which ours have none.
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


def control(given: dict[str, Any]) -> Any:
    """Run Ray Train's controller in this process, and wait for it.

    Args:
        given: what the controller is made of.

    Returns:
        Ray Train's result.
    """
    controller = _Controller(**given)
    # Its log keeps what it says; to the user the command has words of its own.
    logger = logging.getLogger("ray.train")
    for handler in list(logger.handlers):
        if isinstance(handler, logging.StreamHandler):
            logger.removeHandler(handler)
    asyncio.run(controller.run())
    return controller.get_result()
