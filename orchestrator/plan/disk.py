"""Bytes that a job leaves on disk, by use, as far as they can be counted."""

from orchestrator.plan.fit import Need, Settled, all_trials

# The tokenized rows (data/dataset.py): of a token its id and whether it is trained; of an example
# its end, targets, answer and hash, and its place among the training or validation examples.
_TOKEN, _EXAMPLE = 4 + 1, 8 + 4 + 4 + 8 + 8


def disk_bytes(settled: Settled) -> dict[str, int]:
    """Bytes on disk by use.

    base_store: the base in the cache. shared_base: its copy beside the runs, from which other
    nodes take it; workers of one node need none. data: the tokenized rows, 0 where the rows cannot
    be counted. checkpoints: float32 weights and the optimizer's state. adapter: of each trial, and
    a copy of the best.
    """
    need, job = settled.need, settled.need.job
    trials = all_trials(job)
    weights = 4 * settled.adapter_parameters
    state = settled.parts["optimizer"] // need.trials
    return {
        "base_store": settled.base.total,
        "shared_base": settled.base.total if need.machine.gpus > 1 else 0,
        "data": _data(need),
        "checkpoints": trials * _kept(need) * (weights + state),
        "adapter": (trials + (job.sweep is not None)) * weights,
    }


def _kept(need: Need) -> int:
    """Checkpoints that stay of each trial: the newest, and the best by eval loss."""
    job, steps = need.job, need.steps
    kept = job.checkpoint.keep + (0 if job.data.validation is None else 1)
    if steps is None:
        return kept
    # Step 0 stands for the last one.
    saved = len({*range(0, steps, job.checkpoint.every), *range(0, steps, job.evaluation.every)})
    # A population goes on from any of its checkpoints.
    return saved if job.sweep and job.sweep.scheduler == "pbt" else min(kept, saved)


def _data(need: Need) -> int:
    if need.examples is None:
        return 0
    share = need.job.data.validation
    trained = 1 - share if isinstance(share, float) else 1.0
    return round((_TOKEN * need.examples.tokens + _EXAMPLE * need.examples.count) / trained)
