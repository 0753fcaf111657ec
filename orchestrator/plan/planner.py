"""`plan_job`: a job's bytes on one device, whether they fit, and what would make them fit."""

import os
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.config import JobConfig
from orchestrator.errors import UnplannableError
from orchestrator.plan import advice as advices
from orchestrator.plan.disk import disk_bytes
from orchestrator.plan.examples import count_examples
from orchestrator.plan.fit import (
    MOST_TRIALS,
    Need,
    Settled,
    cpu_workers,
    engines,
    largest_rank,
    longest_example,
    most_tenants,
    most_workers,
    on_one_gpu,
    processes_here,
    settle,
    sharing,
    train_apart,
    trials_at_once,
    trials_each,
)
from orchestrator.plan.limits import free_bytes
from orchestrator.plan.machine import Gpu, look_at_gpu, machine
from orchestrator.plan.parts import WIDTH
from orchestrator.plan.shapes import read_shape
from orchestrator.plan.speed import Pace, pace


@dataclass(frozen=True)
class Plan:
    """What a job takes of each device.

    Attributes:
        fits: whether the total is within `gpu_bytes`.
        gpu_bytes: memory of one device; on a CPU what this process can have.
        per_gpu_bytes: base, adapters, gradients, optimizer, activations, logits, overhead, total.
            `activations` and `logits` are what is held when a pass holds most; `activations`
            includes the dequantized weight of that moment.
        concurrent_trials: how many adapters at once would fit, at most 64.
        tokens_per_pass: the job's token budget, or the best that fits.
        disk_bytes: the quantized base and its shared copy, tokenized rows, checkpoints and
            adapters, of all trials.
        advice: `--set` arguments, cheapest change first, that together make the job fit.
        details: further figures by name.
    """

    fits: bool
    gpu_bytes: int
    per_gpu_bytes: dict[str, int]
    concurrent_trials: int
    tokens_per_pass: int
    disk_bytes: int
    advice: tuple[str, ...]
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that `plan --json` prints."""
        return {
            "fits": self.fits,
            "gpu_bytes": self.gpu_bytes,
            "per_gpu_bytes": dict(self.per_gpu_bytes),
            "concurrent_trials": self.concurrent_trials,
            "tokens_per_pass": self.tokens_per_pass,
            "disk_bytes": self.disk_bytes,
            "advice": list(self.advice),
            **self.details,
        }


def plan_job(
    job: JobConfig,
    gpu_memory: int | None = None,
    gpus: int | None = None,
    trials: int | None = None,
    longest: int | None = None,
    calibrate: bool = True,
) -> Plan:
    """Plan a job without loading any weights.

    Args:
        job: the resolved job.
        gpu_memory: bytes of a GPU that need not be here; None plans for the device at hand.
        gpus: number of devices; None takes the job's workers or what is here.
        trials: adapters that train at once on a device; None takes the sweep's, or one.
        longest: tokens of the longest example, where known; `data.max_length` otherwise.
        calibrate: time the device at hand for a moment, to say how long the job takes.

    Raises:
        RefusedError: the model's shape is not to be had, or the settings contradict the device.
    """
    shape = read_shape(job.model)
    cuda = False if job.cluster.gpus_per_worker == 0 else None
    count = gpus or most_workers(job)
    device = machine(gpu_memory, count, cuda, sharing(job), on_one_gpu(job))
    need = Need(
        shape,
        device,
        job,
        trials or 1,
        longest or longest_example(job),
        examples=count_examples(job.data, job.model),
    )
    if not device.cuda and processes_here(job) > 1:
        need = _beside(need, processes_here(job))
    if trials is None:
        need = _with_trials(need)
    plan = make_plan(need, calibrate)
    settled = Settled(need, plan.tokens_per_pass, plan.details["gradient_checkpointing"])
    # A run that begins need not wait for what it does not do.
    both = {
        "activations_with_checkpointing": _activations(settled, True),
        "activations_without_checkpointing": _activations(settled, False),
    }
    return replace(plan, details={**plan.details, **both})


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
    apart, each = train_apart(wanted, least), min(trials_each(wanted, least), MOST_TRIALS)
    need = _need_here(job, cuda, gpu, most if here else 1)
    if need is not None:
        need = replace(need, engines=engines(wanted, least))
    try:
        fit = each if need is None else _tenants(need, each)
    except UnplannableError:
        fit = each
    return min(wanted, fit * least if apart else fit)


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
    need, most = _need_here(job, False, None), cpu_workers(job, cores)
    try:
        return most if need is None else _as_many_as_fit(need, most).machine.processes
    except UnplannableError:
        return most


def _as_many_as_fit(need: Need, most: int) -> Need:
    """The job as one of up to so many processes that share this machine.

    Not of so many that they would have to recompute layers for it.
    """
    job = need.job
    told = job.sweep is not None and job.sweep.concurrent != "auto"
    alone = settle(replace(need, trials=trials_at_once(job, False) if told else 1))
    for workers in range(most, 1, -1):
        wanted = trials_at_once(job, False, workers)
        trials = trials_each(wanted, workers) if told else 1
        each = _beside(need, workers)
        found = replace(each, trials=trials, engines=engines(wanted, workers))
        settled = settle(found)
        recomputes = settled.checkpointing and not alone.checkpointing
        if settled.total <= found.machine.memory and not recomputes:
            return found
    return need


def _beside(need: Need, workers: int) -> Need:
    """The job as one of so many processes of this machine, none of which has begun."""
    share = machine(None, need.machine.gpus, False, processes=workers)
    return replace(need, machine=replace(share, memory=free_bytes(workers)))


def runs_that_fit(job: JobConfig, most: int, workers: int) -> int:
    """How many runs of a trial each, at most `most`, this machine's memory holds at a time.

    Args:
        job: the sweep's job.
        most: as its cores allow.
        workers: of each run at most, on CPUs.
    """
    need = _need_here(job, False, None)
    if need is None:
        return most
    try:
        for runs in range(most, 1, -1):
            found = _beside(need, runs * workers)
            if settle(found).total <= found.machine.memory:
                return runs
    except UnplannableError:
        return most
    return min(most, 1)


def unfit_trial(
    job: JobConfig, cuda: bool, gpu: Gpu | None = None, processes: int = 1
) -> Plan | None:
    """The plan of one trial that does not fit the device at hand; None where it fits.

    None too where that is not to be known.

    Args:
        job: the trial's job.
        cuda: whether it trains on GPUs; this machine may be one without.
        gpu: what a worker's machine has, by `describe_gpu`; None looks at this machine's.
        processes: workers on CPUs that share this machine.
    """
    need = _need_here(job, cuda, gpu, processes)
    if need is None or settle(need).total <= need.machine.memory:
        return None
    return make_plan(need, calibrate=False)


def _need_here(job: JobConfig, cuda: bool, gpu: Gpu | None, processes: int = 1) -> Need | None:
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
    need = Need(shape, device, job, 1, longest_example(job))
    return need if cuda or processes == 1 else _beside(need, processes)


def _with_trials(need: Need) -> Need:
    """The job with as many trials on each device as its sweep trains there at a time."""
    job, most = need.job, need.machine.gpus
    if job.sweep is None or not job.sweep.shared:
        return need
    least = most
    if isinstance(job.cluster.workers, tuple):
        least = min(most, job.cluster.workers[0])
    elif job.cluster.workers == "auto" and need.machine.cuda:
        least = most = most * sharing(job)
    elif job.cluster.workers == "auto":
        # As a Ray of its own has it.
        need = _as_many_as_fit(need, cpu_workers(job, os.cpu_count() or 1))
        least = most = need.machine.processes
    wanted = trials_at_once(job, need.machine.cuda, most)
    need = replace(need, engines=engines(wanted, least))
    return replace(need, trials=_trials(need, trials_each(wanted, least)))


def _trials(need: Need, wanted: int) -> int:
    """Adapters at a time on a device: a sweep that leaves it open takes as many as fit."""
    sweep = need.job.sweep
    if sweep is None or sweep.concurrent != "auto":
        return wanted
    return max(1, most_tenants(need, wanted))


def make_plan(need: Need, calibrate: bool = True) -> Plan:
    """Plan what is needed; see `plan_job`."""
    job, device, shape, trials = need.job, need.machine, need.shape, need.trials
    settled = settle(need)
    fits = settled.total <= device.memory
    timing = pace(settled) if calibrate and device.at_hand else Pace()
    disk = disk_bytes(settled)
    return Plan(
        fits=fits,
        gpu_bytes=device.memory,
        per_gpu_bytes=settled.parts,
        concurrent_trials=most_tenants(need),
        tokens_per_pass=settled.tokens,
        disk_bytes=sum(disk.values()),
        advice=() if fits else advices.find(need),
        details={
            "model": job.model.base,
            "parameters": shape.parameters,
            "trainable_parameters": settled.adapter_parameters,
            "rank": largest_rank(job),
            "gradient_checkpointing": settled.checkpointing,
            "compute_dtype": settled.dtype,
            "device": "cuda" if device.cuda else "cpu",
            "gpus": device.gpus,
            "processes": device.processes,
            "trials": trials,
            "base_bytes": {
                "packed": settled.base.packed,
                "constants": settled.base.constants,
                "dense": settled.base.dense,
            },
            "unquantized_experts_bytes": shape.experts * WIDTH[settled.dtype],
            "logits_chunk_bytes": settled.passed.logits,
            "largest_dequantized_bytes": settled.largest_weight,
            "collective_bytes": settled.collective,
            "heap_holes_bytes": settled.passed.holes,
            "disk": disk,
            "tokens_per_second": timing.tokens_per_second,
            "seconds": timing.seconds,
            "seconds_rest_on": timing.rests_on,
        },
    )


def _activations(settled: Settled, checkpointing: bool) -> int:
    return replace(settled, checkpointing=checkpointing).parts["activations"]
