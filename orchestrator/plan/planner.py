"""`plan_job`: a job's bytes on one device, whether they fit, and what would make them fit."""

from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.config import JobConfig
from orchestrator.plan import advice as advices
from orchestrator.plan.at_hand import as_many_as_fit, beside, need_here
from orchestrator.plan.disk import disk_bytes
from orchestrator.plan.examples import count_examples
from orchestrator.plan.fit import (
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
    trials_at_once,
    trials_each,
)
from orchestrator.plan.machine import Gpu, machine
from orchestrator.plan.parts import WIDTH
from orchestrator.plan.shapes import read_shape
from orchestrator.plan.speed import Pace, pace
from orchestrator.processor import cores


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
    need = beside(need, processes_here(job))
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
    need = need_here(job, cuda, gpu, processes)
    if need is None or settle(need).total <= need.machine.memory:
        return None
    return make_plan(need, calibrate=False)


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
        need = as_many_as_fit(need, cpu_workers(job, cores()))
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
