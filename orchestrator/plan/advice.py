"""The cheapest changes that make a job fit, each checked by planning with it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from orchestrator.config import JobConfig
from orchestrator.plan.fit import STEP, Need, Settled, settle

_CONCURRENT = "sweep.concurrent"


def find(need: Need) -> tuple[str, ...]:
    """`--set` arguments that together make the job fit; empty where nothing does.

    Changes that leave the mathematics alone come first, in order of what they cost in speed;
    then those that change what is learned. A change that saves nothing is left out, and one that
    later ones have made needless is taken back.
    """
    taken: list[tuple[str, Any]] = []
    for key, value in _candidates(need):
        before = settle(_with(need, taken))
        after = settle(_with(need, [*taken, (key, value)]))
        if after.total < before.total:
            taken = [*[t for t in taken if t[0] != key], (key, value)]
        if _fits(after):
            return tuple(f"{k}={_written(v)}" for k, v in _needed(need, taken))
    return ()


def _needed(need: Need, taken: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    for change in reversed(taken[:-1]):
        rest = [other for other in taken if other != change]
        if _fits(settle(_with(need, rest))):
            return _needed(need, rest)
    return taken


def _candidates(need: Need) -> Iterator[tuple[str, Any]]:
    job = need.job
    if job.training.gradient_checkpointing is False:
        yield "training.gradient_checkpointing", True
    if job.training.tokens_per_pass != "auto" and job.training.tokens_per_pass > STEP:
        tokens = job.training.tokens_per_pass // 2
        while tokens >= STEP:
            yield "training.tokens_per_pass", tokens // STEP * STEP
            tokens //= 2
    trials = need.trials // 2
    while trials:
        yield _CONCURRENT, trials * need.engines
        trials //= 2
    if not job.quantization.double_quant:
        yield "quantization.double_quant", True
    if job.quantization.compute_dtype == "float32" and need.machine.bfloat16:
        yield "quantization.compute_dtype", "bfloat16"
    if need.machine.cuda and job.training.optimizer != "paged_adamw_8bit":
        yield "training.optimizer", "paged_adamw_8bit"
    if job.quantization.type == "none":
        yield "quantization.type", "nf4"
    rank = job.lora.rank // 2
    while rank >= 4:
        yield "lora.rank", rank
        rank //= 2
    length = need.longest // 2
    while length >= 2 * STEP:
        yield "data.max_length", length
        length //= 2


def _with(need: Need, changes: list[tuple[str, Any]]) -> Need:
    job, longest, trials = need.job, need.longest, need.trials
    for key, value in changes:
        if key == _CONCURRENT:
            trials = value // need.engines
            continue
        job = _set(job, key, value)
        if key == "data.max_length":
            longest = min(longest, value)
    return replace(need, job=job, longest=longest, trials=trials)


def _set(job: JobConfig, key: str, value: Any) -> JobConfig:
    section, name = key.split(".")
    changed = getattr(job, section).model_copy(update={name: value})
    return job.model_copy(update={section: changed})


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fits(settled: Settled) -> bool:
    return settled.total <= settled.need.machine.memory
