"""The search space: which keys of the job file, with which values. Pure, no Ray."""

import random
from collections.abc import Collection, Iterator, Mapping
from itertools import chain, combinations, islice, product
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from orchestrator.config import LISTED_KINDS, JobConfig, SweepConfig
from orchestrator.errors import JobFileError, RefusedError
from orchestrator.jobfile import job_from_mapping

Params = Mapping[str, Any]
_NOT_SEARCHED = ("name", "output_dir", "tracking", "cluster", "sweep", "evaluation", "checkpoint")
# Of all keys' values so many pairs are tried; a trial of another that is bad fails by itself.
_MOST_PAIRS = 2048
PBT_KEY = "training.learning_rate"
"""What a population changes on the way."""
# PBT goes on from any trial's evaluation, so none of their checkpoints may go.
_ALL_CHECKPOINTS = 10**6


def check(job: JobConfig) -> SweepConfig:
    """The job's sweep, if it can be searched.

    Raises:
        RefusedError: the space is empty, a key or value is not one of the job file's, or the
            settings contradict each other.
    """
    sweep = job.sweep
    if sweep is None or not sweep.search_space:
        raise RefusedError(
            "sweep.search_space is empty: name the keys to search, such as "
            "{lora.rank: {choice: [8, 16, 32]}}"
        )
    for key, domain in sweep.search_space.items():
        if key.startswith(_NOT_SEARCHED):
            raise RefusedError(f"sweep.search_space: {key} is the sweep's own and not searched")
        for value in _edges(domain):
            _try(job, {key: value}, f"sweep.search_space.{key}")
        if isinstance(value_of(job, key), BaseModel):
            raise RefusedError(f"sweep.search_space: {key} is a section; name one of its keys")
    for number, point in enumerate(sweep.points):
        if set(point) != set(sweep.search_space):
            keys = ", ".join(sorted(sweep.search_space))
            raise RefusedError(f"sweep.points[{number}]: give a value for each of {keys}")
        _try(job, point, f"sweep.points[{number}]")
        for key, value in point.items():
            if not holds(sweep.search_space[key], value):
                raise RefusedError(
                    f"sweep.points[{number}]: {key} is {value}, which is not in its search space "
                    f"{sweep.search_space[key]}"
                )
    # No rule of a job file is about more than two keys, and those are mostly of one section.
    pairs = sorted(combinations(sweep.search_space, 2), key=_of_two_sections)
    for values in islice(chain.from_iterable(_corners(sweep, p) for p in pairs), _MOST_PAIRS):
        _try(job, values, f"sweep.search_space: {_written(values)} do not go together")
    _check_metric(job, sweep)
    _check_searcher(sweep)
    return sweep


def holds(domain: Mapping[str, list[Any]], value: Any) -> bool:
    """Whether a key's domain has a value."""
    kind, values = next(iter(domain.items()))
    if kind in LISTED_KINDS:
        return value in values
    return isinstance(value, (int, float)) and values[0] <= value <= values[1]


def most_steps(job: JobConfig, sweep: SweepConfig) -> int | None:
    """Optimizer steps of the longest trial; None where the data's size decides it."""
    domain = sweep.search_space.get("training.max_steps")
    steps = [job.training.max_steps] if domain is None else _edges(domain)
    return None if None in steps else max(steps)


def is_shared(job: JobConfig) -> bool:
    """Whether trials are tenants of one base: where all that is searched is the adapter's own."""
    sweep = job.sweep
    assert sweep is not None
    return sweep.shared


def grid_order(sweep: SweepConfig, values: list[Any]) -> list[Any]:
    """A grid's values in the order of their trials.

    Asynchronous halving stops who is worse than those before, so values that rise from worse to
    better would all be trained to their end: for it they are mixed.
    """
    if sweep.scheduler != "asha":
        return list(values)
    return random.Random(sweep.seed).sample(values, len(values))


def _edges(domain: Mapping[str, list[Any]]) -> list[Any]:
    """The listed values, or a range's ends as the searcher gives them."""
    kind, values = next(iter(domain.items()))
    return [float(value) for value in values] if kind in ("uniform", "loguniform") else values


def _corners(sweep: SweepConfig, keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """Every combination of these keys' listed values and ranges' ends."""
    edges = [_edges(sweep.search_space[key]) for key in keys]
    for combination in product(*edges):
        yield dict(zip(keys, combination, strict=True))


def _of_two_sections(pair: tuple[str, str]) -> bool:
    first, second = (key.partition(".")[0] for key in pair)
    return first != second


def _written(params: Params) -> str:
    return ", ".join(f"{key}={value}" for key, value in params.items())


def trial_job(job: JobConfig, name: str, trials_dir: Path, params: Params, uri: str) -> JobConfig:
    """The job of one trial: a fine-tune in a folder of its own.

    Args:
        job: the sweep's.
        name: the trial's id.
        trials_dir: where the trials' folders lie.
        params: what the searcher chose, by key.
        uri: the sweep's MLflow store.

    Raises:
        RefusedError: the values do not go together.
    """
    made = with_params(job, params)
    keep = made.checkpoint.keep
    if job.sweep is not None and job.sweep.scheduler == "pbt":
        keep = _ALL_CHECKPOINTS
    return made.model_copy(
        update={
            "name": name,
            "output_dir": str(trials_dir),
            "sweep": None,
            "tracking": made.tracking.model_copy(update={"uri": uri, "registered_model": None}),
            "checkpoint": made.checkpoint.model_copy(update={"keep": keep}),
            "evaluation": made.evaluation.model_copy(update={"samples": 0}),
        }
    )


def best_job(job: JobConfig, params: Params) -> JobConfig:
    """The sweep's job with its best trial's values, for `finetune`."""
    return with_params(job, params).model_copy(update={"name": f"{job.name}-best", "sweep": None})


def with_params(job: JobConfig, params: Params) -> JobConfig:
    """The job with these keys set, checked like a job file.

    Raises:
        JobFileError: a key or value is not allowed.
    """
    content = job.model_dump()
    for key, value in params.items():
        *sections, last = key.split(".")
        place = content
        for section in sections:
            below = place.get(section)
            if not isinstance(below, dict):
                below = place[section] = {}
            place = below
        place[last] = value
    return job_from_mapping(content)


def value_of(job: JobConfig, key: str) -> Any:
    """What a job holds under a dotted key; None where a free mapping has no such entry."""
    value: Any = job
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part)
    return value


def _try(job: JobConfig, params: Params, where: str) -> None:
    try:
        with_params(job, params)
    except JobFileError as error:
        raise RefusedError(f"{where}: {error}") from error


def _check_metric(job: JobConfig, sweep: SweepConfig) -> None:
    if sweep.metric in ("eval_loss", "perplexity") and job.data.validation is None:
        raise RefusedError(
            f"sweep.metric: nothing reports {sweep.metric}, for data.validation is null; give a "
            "share such as 0.05, or take train_loss"
        )


def _check_searcher(sweep: SweepConfig) -> None:
    if sweep.searcher == "grid":
        ranges = [k for k, d in sweep.search_space.items() if not d.keys() & set(LISTED_KINDS)]
        if ranges:
            raise RefusedError(
                f"sweep.searcher: grid needs listed values; {', '.join(ranges)} is a range"
            )
        size = prod(len(_edges(domain)) for domain in sweep.search_space.values())
        if size > sweep.trials:
            raise RefusedError(
                f"sweep.trials: the grid has {size} points and only {sweep.trials} trials; set "
                f"sweep.trials to {size}, or take searcher random"
            )
        if sweep.points:
            raise RefusedError("sweep.points: a grid tries every point anyway; leave them out")
    if sweep.scheduler == "pbt":
        if PBT_KEY not in sweep.search_space:
            raise RefusedError(f"sweep.scheduler: pbt changes {PBT_KEY}; search it")
        if sweep.searcher != "random":
            raise RefusedError(
                "sweep.searcher: pbt changes trials by itself, so it goes with random only"
            )
        if not sweep.can_share:
            raise RefusedError(
                "sweep.scheduler: pbt moves adapters between trials, so only lora.* and "
                "training.* can differ"
            )
    if sweep.placement == "shared" and not sweep.can_share:
        raise RefusedError(
            "sweep.placement: trials share one base, so only lora.* and training.* can differ; "
            "take auto or isolated"
        )
