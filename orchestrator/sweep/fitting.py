"""Values that no device of the cluster can hold are left out of a search; the others go on."""

from collections.abc import Callable
from typing import Any

from orchestrator.config import LISTED_KINDS, JobConfig, SweepConfig
from orchestrator.errors import RefusedError
from orchestrator.sweep.space import Params, holds, with_params

# Keys whose values decide how large an adapter is.
_SIZES = ("lora.rank", "lora.target_modules")

Reason = Callable[[JobConfig], str | None]


def leave_out(job: JobConfig, reason: Reason, say: Callable[[str], None]) -> JobConfig:
    """The job with a search space of which every adapter fits beside the base.

    Args:
        job: the sweep's, checked.
        reason: why a trial's job does not fit, None where it does.
        say: is told what is left out, and why.

    Raises:
        RefusedError: no value of a key fits.
    """
    sweep = job.sweep
    assert sweep is not None
    space = dict(sweep.search_space)
    for key in set(_SIZES) & set(space):
        space[key] = _fitting(job, key, space[key], reason, say)
    points = tuple(p for p in sweep.points if all(holds(space[k], p[k]) for k in _SIZES if k in p))
    if len(points) < len(sweep.points):
        say(f"sweep.points: {len(sweep.points) - len(points)} of them cannot fit and are left out")
    return job.model_copy(update={"sweep": _with(sweep, space, points)})


def left_out(sweep: SweepConfig, params: Params) -> str | None:
    """Why a trial is not trained: a searcher that goes on proposes of the space it began with.

    Args:
        sweep: of the job that `leave_out` gave.
        params: what was proposed, by key.
    """
    for key in _SIZES:
        if key in params and not holds(sweep.search_space[key], params[key]):
            return f"{key}={params[key]} does not fit in the memory here, and is left out"
    return None


def _fitting(
    job: JobConfig,
    key: str,
    domain: dict[str, list[Any]],
    reason: Reason,
    say: Callable[[str], None],
) -> dict[str, list[Any]]:
    kind, values = next(iter(domain.items()))

    def refusal(value: Any) -> str | None:
        return reason(with_params(job, {key: value}))

    kept, why = _kept(values, refusal)
    if why is None:
        return domain
    if not kept:
        raise RefusedError(f"sweep.search_space.{key}: no value fits. {why}")
    if kind in LISTED_KINDS:
        left = [value for value in values if value not in kept]
        say(f"sweep.search_space.{key}: {', '.join(map(str, left))} left out. {why}")
        return {kind: kept}
    low, high = _largest(int(values[0]), int(values[1]), lambda value: refusal(value) is None)
    say(f"sweep.search_space.{key}: searched up to {low} in place of {high}. {why}")
    # A range of one value is a list of one.
    return {kind: [values[0], low]} if low > values[0] else {"choice": [low]}


def _kept(values: list[Any], refusal: Callable[[Any], str | None]) -> tuple[list[Any], str | None]:
    """The values that fit, in their order, and why another does not."""
    ranks = all(isinstance(value, int) for value in values)
    refused = []
    for value in sorted(values, reverse=True) if ranks else values:
        if why := refusal(value):
            refused.append((value, why))
        elif ranks:
            # All smaller ranks take less.
            break
    left = [value for value, _ in refused]
    return [value for value in values if value not in left], refused[-1][1] if refused else None


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> tuple[int, int]:
    """The largest value between one that fits and one that does not, and the latter."""
    most = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, most


def _with(sweep: SweepConfig, space: dict[str, Any], points: tuple[Any, ...]) -> SweepConfig:
    return sweep.model_copy(update={"search_space": space, "points": points})
