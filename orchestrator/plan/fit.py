"""A job's bytes on one device as a function of its settings, and the best settings that fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod

from orchestrator.config import JobConfig
from orchestrator.lengths import DENSE_LIMIT, ROW_STEP, row_length
from orchestrator.plan.examples import Examples
from orchestrator.plan.machine import Machine
from orchestrator.plan.parts import (
    WIDTH,
    BaseBytes,
    adapter_bytes,
    adapter_parameters,
    base_bytes,
    compute_dtype,
    optimizer_bytes,
    target_layers,
)
from orchestrator.plan.passes import Pass, PassBytes, pass_bytes
from orchestrator.plan.shapes import Shape
from orchestrator.processor import cores, product_dtype

# Tokens of a pass, on CUDA or not, from which on longer ones are no faster and take more memory.
MOST_TOKENS = {True: 16384, False: 1024}
STEP, MOST_TRIALS = 256, 64
# Tenants beyond these wait for one another's passes: a CPU is busy with one while the other's trial
# asks its scheduler, a GPU with a few. The fewer are at work, the more each later trial can learn
# from those before it, and on a CPU each one's process takes of its time.
MOST_AT_ONCE = {True: 16, False: 2}
# A budget that is chosen for the user leaves the allocator room for holes between its blocks.
_FILLED = 0.9
# Tokens of a short example where the data is not known.
SHORT = 128


@dataclass(frozen=True)
class Need:
    """A job on a device.

    trials: adapters at a time on this device. longest: tokens of its longest example. short: of one
    of its short ones. most: tokens of all that a worker passes in a step, where known. examples:
    what is trained on, where known. engines: workers of which each trains trials of its own; one
    where all train the same.
    """

    shape: Shape
    machine: Machine
    job: JobConfig
    trials: int
    longest: int
    most: int | None = None
    short: int = SHORT
    examples: Examples | None = None
    engines: int = 1

    @property
    def apart(self) -> bool:
        """Whether each worker trains trials of its own."""
        return self.engines > 1

    @property
    def steps(self) -> int | None:
        """Optimizer steps of a trial, at most; None where the data's size is not known."""
        training = self.job.training
        most = _largest_tried(self.job, "training.max_steps", training.max_steps or 0)
        if most or self.examples is None:
            return most or None
        each = ceil(self.examples.count / largest_batch(self.job))
        return max(1, ceil(training.epochs * each - 1e-9))


@dataclass(frozen=True)
class Settled:
    """A job with its token budget and checkpointing decided."""

    need: Need
    tokens: int
    checkpointing: bool

    @cached_property
    def dtype(self) -> str:
        """The compute dtype."""
        return compute_dtype(self.need.job, self.need.machine)

    @property
    def products(self) -> str:
        """The dtype of the matrix products, and of the adapters' working copies."""
        return product_dtype(self.dtype, self.need.machine.cuda)

    @cached_property
    def base(self) -> BaseBytes:
        """The frozen base."""
        quantization = self.need.job.quantization
        quantized = quantization.type != "none"
        return base_bytes(self.need.shape, quantized, quantization.double_quant, self.dtype)

    @cached_property
    def adapter_parameters(self) -> int:
        """Weights of one adapter."""
        job = self.need.job
        layers = target_layers(self.need.shape, job.lora.target_modules)
        return adapter_parameters(layers, largest_rank(job))

    @property
    def collective(self) -> int:
        """The flat float32 copy of all gradients that workers sum (collective.py)."""
        if self.need.machine.gpus == 1 or self.need.apart:
            return 0
        return 4 * self.need.trials * self.adapter_parameters

    @property
    def largest_weight(self) -> int:
        """The largest layer's weight when dequantized for its product."""
        if self.need.job.quantization.type == "none":
            return 0
        sizes = [layer.weights for layer in self.need.shape.linears if layer.quantized]
        return max(sizes, default=0) * WIDTH[self.dtype]

    @property
    def _lanes_more(self) -> int:
        """What passes side by side hold beyond one: a dequantized weight each (lanes.py)."""
        need = self.need
        if need.machine.cuda or (need.machine.gpus > 1 and not need.apart):
            return 0
        threads = cores() // need.machine.processes
        lanes = max(1, min(need.trials, threads))
        return (lanes - 1) * self.largest_weight * WIDTH[self.products] // WIDTH[self.dtype]

    @cached_property
    def passed(self) -> PassBytes:
        """The pass that holds most, of the rows that the data may give."""
        return max(
            (pass_bytes(self.need.shape, p) for p in self._passes()), key=lambda b: b.peak + b.holes
        )

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes by part; they add up to `total`."""
        need, trials = self.need, self.need.trials
        parameters = self.adapter_parameters
        peak, logits = self.passed.peak, self.passed.logits if self.passed.in_loss else 0
        static = {
            "base": self.base.total,
            "adapters": trials * adapter_bytes(parameters, self.products),
            "gradients": trials * 4 * parameters,
            "optimizer": trials
            * optimizer_bytes(parameters, need.job.training.optimizer, need.machine),
        }
        peak += self._lanes_more
        # Activations are gone when the workers sum their gradients.
        peak = max(peak, self.collective)
        moving = {"activations": peak - logits, "logits": logits}
        parts = {**static, **moving, "overhead": need.machine.overhead + self.passed.holes}
        return {**parts, "total": sum(parts.values())}

    @property
    def total(self) -> int:
        """Bytes on each device."""
        return self.parts["total"]

    def _passes(self) -> list[Pass]:
        need, job, trials = self.need, self.need.job, self.need.trials
        layers = target_layers(need.shape, job.lora.target_modules)
        rows = dict.fromkeys(self._row(length) for length in (need.longest, self._short))
        return [
            Pass(
                lengths=row,
                checkpointing=self.checkpointing,
                rank=largest_rank(job),
                # What is shorter than a step may be filling.
                tenants=min(need.trials, sum(part >= min(row[0], ROW_STEP) for part in row)),
                dropout=job.lora.dropout,
                targets=frozenset(layer.name for layer in layers),
                quantized=job.quantization.type != "none",
                double_quant=job.quantization.double_quant,
                dtype=self.dtype,
                cuda=need.machine.cuda,
                varlen=need.machine.cuda and need.machine.bfloat16,
                products=self.products,
                longest_row=self.tokens if job.data.validation and not need.machine.cuda else 0,
                standing=() if need.machine.cuda else (4 * self.adapter_parameters,) * 2 * trials,
            )
            for row in rows
        ]

    @property
    def _short(self) -> int:
        """Tokens of each example of a row that may hold more than one of the longest."""
        need = self.need
        if not need.machine.cuda:
            # Those keep their attention's probabilities.
            return min(need.longest, DENSE_LIMIT)
        # CUDA's kernel takes memory for each example; a step has so many.
        count = need.trials * largest_batch(need.job)
        return min(need.longest, max(need.short, -(-self.tokens // count)))

    def _row(self, longest: int) -> tuple[int, ...]:
        """A full row of examples that are as long as they may be."""
        tokens = max(min(self.tokens, self.need.most or self.tokens), longest)
        if not self.need.machine.cuda:
            tokens = row_length(tokens, self.tokens)
        whole, rest = divmod(tokens, longest)
        return (longest,) * whole + ((rest,) if rest else ())


def settle(need: Need) -> Settled:
    """What the job file says; where it says `auto`, the best that fits.

    A pass that recomputes its layers costs a third more, a short one little: so layers are
    recomputed only where without it not even an eighth of the wanted tokens fits.
    """
    training, most = need.job.training, MOST_TOKENS[need.machine.cuda]
    wanted = most if training.tokens_per_pass == "auto" else training.tokens_per_pass
    fixed = training.tokens_per_pass != "auto"
    checkpointing = training.gradient_checkpointing
    if checkpointing == "auto":
        least = wanted if fixed else max(STEP, wanted // 8)
        # The most first: it mostly fits, and is asked for below.
        checkpointing = not any(
            _fits(Settled(need, tokens, False), _FILLED) for tokens in (wanted, least)
        )
    if fixed:
        return Settled(need, wanted, checkpointing)
    count = _largest(
        wanted // STEP, lambda n: _fits(Settled(need, n * STEP, checkpointing), _FILLED)
    )
    return Settled(need, max(1, count) * STEP, checkpointing)


def most_tenants(need: Need, wanted: int = MOST_TRIALS) -> int:
    """How many adapters at once fit over one base, at most `wanted` and MOST_TRIALS."""
    training = need.job.training
    tokens = STEP if training.tokens_per_pass == "auto" else training.tokens_per_pass
    recomputed = training.gradient_checkpointing is not False
    most = min(wanted, MOST_TRIALS)
    return _largest(most, lambda n: _fits(Settled(replace(need, trials=n), tokens, recomputed)))


def trials_at_once(job: JobConfig, cuda: bool, workers: int = 1) -> int:
    """Adapters that train at a time: one, or as many as the job's sweep wants at most."""
    sweep = job.sweep
    if sweep is None:
        return 1
    if sweep.concurrent != "auto":
        return min(sweep.concurrent, sweep.trials)
    # A population evolves together: whoever is not at work cannot be learnt from.
    most = sweep.trials if sweep.scheduler == "pbt" else max(MOST_AT_ONCE[cuda], workers)
    return min(most, sweep.trials)


def engines(trials: int, workers: int) -> int:
    """Workers of which each trains trials of its own; one where all train the same."""
    return workers if train_apart(trials, workers) else 1


def train_apart(trials: int, workers: int) -> bool:
    """Whether each worker trains trials of its own: where there is one for each.

    They wait for no other then, and passes are as long as a trial's batch lets them be. With fewer
    trials each is trained by all workers.
    """
    return 1 < workers <= trials


def trials_each(trials: int, workers: int) -> int:
    """Trials at a time on each of so many workers, of so many on all."""
    return ceil(trials / engines(trials, workers))


def sharing(job: JobConfig) -> int:
    """Workers that share one GPU."""
    share = job.cluster.gpus_per_worker
    return max(1, round(1 / share)) if share != "auto" and 0 < share < 1 else 1


def on_one_gpu(job: JobConfig) -> int:
    """Workers of this job that share one GPU, at most."""
    return min(sharing(job), most_workers(job) or sharing(job))


def processes_here(job: JobConfig) -> int:
    """Workers of a job on CPUs that share this machine; one on a cluster that the job names."""
    if job.cluster.address not in ("auto", "local"):
        return 1
    able = int(cores() // job.cluster.cpus_per_worker)
    return max(1, min(most_workers(job) or 1, able))


def cpu_workers(job: JobConfig, cores: float) -> int:
    """Workers that a sweep wants on so many cores of its own: one for each trial at a time."""
    able = int(min(cores, cores // job.cluster.cpus_per_worker))
    return max(1, min(able, trials_at_once(job, False)))


def most_workers(job: JobConfig) -> int | None:
    """The job's workers, at most; None where the cluster decides."""
    workers = job.cluster.workers
    if workers == "auto":
        return None
    return workers[1] if isinstance(workers, tuple) else workers


def all_trials(job: JobConfig) -> int:
    """Trials of the job's sweep in all; one where it has none."""
    sweep = job.sweep
    if sweep is None:
        return 1
    if sweep.searcher == "grid":
        return prod(len(values) for d in sweep.search_space.values() for values in d.values())
    return sweep.trials


def largest_rank(job: JobConfig) -> int:
    """The rank to plan for: the job's, or the largest that its sweep may try."""
    return _largest_tried(job, "lora.rank", job.lora.rank)


def longest_example(job: JobConfig) -> int:
    """Tokens of an example to plan for: the data's limit, or the largest that its sweep may try."""
    return _largest_tried(job, "data.max_length", job.data.max_length)


def largest_batch(job: JobConfig) -> int:
    """The batch size to plan for: the job's, or the largest that its sweep may try."""
    return _largest_tried(job, "training.batch_size", job.training.batch_size)


def _largest_tried(job: JobConfig, key: str, own: int) -> int:
    domain = job.sweep.search_space.get(key, {}) if job.sweep else {}
    values = [value for bounds in domain.values() for value in bounds]
    return max([own, *(int(value) for value in values if value is not None)])


def _fits(settled: Settled, filled: float = 1.0) -> bool:
    return settled.total <= filled * settled.need.machine.memory


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest n up to `most` for which `holds` is true, 0 if none; it is false from there."""
    if holds(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
