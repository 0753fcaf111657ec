"""How many trials, workers and runs of a sweep the device at hand holds at a time."""

from dataclasses import replace

from orchestrator.config import JobConfig
from orchestrator.errors import UnplannableError
from orchestrator.plan.fit import (
    MOST_TRIALS,
    Need,
    cpu_workers,
    engines,
    longest_example,
    most_tenants,
    most_workers,
    on_one_gpu,
    settle,
    sharing,
    trials_at_once,
    trials_each,
)
from orchestrator.plan.limits import free_bytes
from orchestrator.plan.machine import Gpu, look_at_gpu, machine
from orchestrator.plan.shapes import read_shape


def trials_that_fit(
    job: JobConfig,
    cuda: bool,
    gpu: Gpu | None = None,
    workers: int | tuple[int, int] = 1,
    here: bool = False,
) -> int:
    """How many adapters at once fit the devices at hand, of those that are wanted at a time.

    As many as are wanted where the device is not to be known.

    Args:
        job: the sweep's job.
        cuda: whether it trains on GPUs; this machine may be one without.
        gpu: what a worker's machine has, by `describe_gpu`; None looks at this machine's.
        workers: how many train, or between which numbers; the fewest must hold all.
        here: whether all of them share this machine's memory.
    """
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    wanted = trials_at_once(job, cuda, most)
    count, each = engines(wanted, least), min(trials_each(wanted, least), MOST_TRIALS)
    need = need_here(job, cuda, gpu, most if here else 1)
    try:
        fit = each if need is None else _tenants(replace(need, engines=count), each)
    except UnplannableError:
        fit = each
    return min(wanted, fit * count)


def _tenants(need: Need, wanted: int) -> int:
    """Adapters at once, at most `wanted`; of so many the run plans the same passes."""
    all_of_them = replace(need, trials=wanted)
    if settle(all_of_them).total <= need.machine.memory:
        return wanted
    return most_tenants(need, wanted)


def workers_that_fit(job: JobConfig, cores: float) -> int:
    """How many processes a sweep of `auto` workers has on so many cores of its own.

    Args:
        job: the sweep's job.
        cores: of this machine.
    """
    need, most = need_here(job, False, None), cpu_workers(job, cores)
    try:
        return most if need is None else as_many_as_fit(need, most).machine.processes
    except UnplannableError:
        return most


def as_many_as_fit(need: Need, most: int) -> Need:
    """A sweep's job as one of up to so many processes that share this machine.

    Not of so many that they would have to recompute layers for it.
    """
    job = need.job
    told = job.sweep is not None and job.sweep.concurrent != "auto"
    alone = settle(replace(need, trials=trials_at_once(job, False) if told else 1))
    for workers in range(most, 1, -1):
        wanted = trials_at_once(job, False, workers)
        trials = trials_each(wanted, workers) if told else 1
        each = beside(need, workers)
        found = replace(each, trials=trials, engines=engines(wanted, workers))
        settled = settle(found)
        recomputes = settled.checkpointing and not alone.checkpointing
        if settled.total <= found.machine.memory and not recomputes:
            return found
    return need


def beside(need: Need, workers: int) -> Need:
    """The job as one of so many processes of this machine, none of which has begun.

    One alone has all of it; GPUs are shared by other rules.
    """
    if need.machine.cuda or workers == 1:
        return need
    share = machine(None, need.machine.gpus, False, processes=workers)
    return replace(need, machine=replace(share, memory=free_bytes(workers)))


def runs_that_fit(job: JobConfig, most: int, workers: int) -> int:
    """How many runs of a trial each, at most `most`, this machine's memory holds at a time.

    Args:
        job: the sweep's job.
        most: as its cores allow.
        workers: of each run at most, on CPUs.
    """
    need = need_here(job, False, None)
    if need is None:
        return most
    try:
        for runs in range(most, 1, -1):
            found = beside(need, runs * workers)
            if settle(found).total <= found.machine.memory:
                return runs
    except UnplannableError:
        return most
    return min(most, 1)


def need_here(job: JobConfig, cuda: bool, gpu: Gpu | None, processes: int = 1) -> Need | None:
    """One trial of a job on the device at hand; None where that is not to be known."""
    if cuda and gpu is None:
        gpu = look_at_gpu()
        if gpu is None:
            return None
    try:
        shape = read_shape(job.model)
    except UnplannableError:
        return None
    device = machine(None, most_workers(job), cuda, sharing(job), on_one_gpu(job), gpu)
    return beside(Need(shape, device, job, 1, longest_example(job)), processes)
