"""Ray Tune's part: proposes trials, decides which go on, and remembers both across kills."""

import os
from functools import partial
from pathlib import Path

from ray import tune

from orchestrator.config import JobConfig, SweepConfig
from orchestrator.sweep import search
from orchestrator.sweep.state_files import (
    check_readable,
    has_state,
    known_trials,
    whole_files,
)
from orchestrator.sweep.trial import Context, Trial

_FOLDER = ".tune"
_MEMORY = "heard.jsonl"
# Tune's own state is what a killed sweep goes on from; trials keep theirs in their folders.
_SETTINGS = {
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
# A trial only waits, and Tune refuses to ask for nothing: a byte. The smallest share of a CPU would
# keep a worker that takes all CPUs of a node from ever starting.
_TRIAL_RESOURCES = {"memory": 1}


def make_tuner(job: JobConfig, run_dir: Path, context: Context, places: int) -> tune.Tuner:
    """A new search, or the one that a killed sweep left in its folder.

    Args:
        job: the resolved job, whose sweep was checked.
        run_dir: the sweep's folder.
        context: what every trial is told.
        places: trials at a time.

    Raises:
        OrchestratorError: what a killed sweep left is damaged.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    folder = run_dir / _FOLDER
    trainable = tune.with_resources(tune.with_parameters(Trial, context=context), _TRIAL_RESOURCES)
    space = search.param_space(context.sweep)
    tuning = _tune_config(job, context.sweep, places, folder)
    running = _run_config(job, run_dir)
    if not has_state(folder):
        return tune.Tuner(trainable, param_space=space, tune_config=tuning, run_config=running)
    check_readable(folder)
    tuner = tune.Tuner.restore(
        str(folder),
        trainable,
        resume_unfinished=True,
        resume_errored=True,
        param_space=space,
        storage_filesystem=running.storage_filesystem,
    )
    # Tune would go on with what the first command told it, and the cluster may be another now;
    # where it cannot restore, it would begin a search of one trial.
    restored = tuner._local_tuner
    restored._tune_config, restored._run_config = tuning, running
    restored._tuner_kwargs["num_samples"] = tuning.num_samples
    return tuner


def _run_config(job: JobConfig, run_dir: Path) -> tune.RunConfig:
    return tune.RunConfig(
        name=_FOLDER,
        storage_path=str(run_dir),
        storage_filesystem=whole_files(),
        failure_config=tune.FailureConfig(max_failures=job.cluster.max_failures),
        # A trial's is a pointer. Without it a killed sweep would judge every evaluation again.
        checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
        verbose=0,
    )


def _tune_config(job: JobConfig, sweep: SweepConfig, places: int, folder: Path) -> tune.TuneConfig:
    # Schedulers are told the metric themselves, and Tune wants it in one place only.
    told = sweep.scheduler != "none"
    return tune.TuneConfig(
        metric=None if told else sweep.metric,
        mode=None if told else sweep.mode,
        search_alg=search.searcher(sweep, places, partial(known_trials, folder)),
        scheduler=search.scheduler(job, sweep, folder / _MEMORY),
        num_samples=1 if sweep.searcher == "grid" else sweep.trials,
        time_budget_s=sweep.time_budget,
        reuse_actors=True,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )
