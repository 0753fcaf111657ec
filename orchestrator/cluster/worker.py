"""What runs on each worker of a Ray Train run."""

import os
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.quiet import quiet_libraries


def train(config: dict[str, Any]) -> Any:
    """Fine-tune as one worker of the run.

    An error the user can act on is returned, not raised: Ray would start the workers again for it.
    """
    quiet_libraries()
    import ray.train
    import torch

    from orchestrator.places import cache_dir
    from orchestrator.tracking.observer import JournalObserver, StopOnly
    from orchestrator.tracking.system import SystemSampler
    from orchestrator.training.collective import World
    from orchestrator.training.run import run

    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size(), context.get_local_rank())
    torch.set_num_threads(config["threads"])
    if os.path.isdir(config["working_dir"]):
        # Relative paths in the job file mean the folder the command was given in.
        os.chdir(config["working_dir"])
    run_dir = Path(config["run_dir"])
    try:
        if not world.leads:
            return run(config["job"], run_dir, cache_dir(), world, StopOnly(run_dir))
        with JournalObserver(run_dir) as observer, SystemSampler(observer.emit):
            return run(config["job"], run_dir, cache_dir(), world, observer)
    except OrchestratorError as error:
        return error
