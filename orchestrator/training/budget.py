"""How many tokens go into one pass, and whether layers are recomputed: as the plan says."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.config import JobConfig, ModelConfig
from orchestrator.errors import RefusedError, UnplannableError
from orchestrator.plan.examples import Examples
from orchestrator.plan.fit import STEP, Need, largest_batch, sharing
from orchestrator.plan.machine import machine
from orchestrator.plan.passes import CHECKPOINTING
from orchestrator.plan.planner import Plan, make_plan
from orchestrator.plan.shapes import read_shape
from orchestrator.plan.show import refusal
from orchestrator.training.collective import World
from orchestrator.training.events import Observer

# Tokens of the shortest budget that training could come down to.
_LEAST = 16
# A row of the data's shortest examples alone is not to be expected; of this share, it may be.
_SHORT = 0.1


@dataclass(frozen=True)
class Budget:
    """Tokens in one pass, and whether gradient checkpointing is on."""

    tokens: int
    checkpointing: bool


def decide(
    job: JobConfig,
    model: ModelConfig,
    lengths: NDArray[np.int64],
    device: torch.device,
    world: World,
    trials: int,
    observer: Observer,
    engines: int = 1,
) -> Budget:
    """What the job file says; where it says `auto`, the best that fits by the plan.

    Args:
        job: the job.
        model: its model as it lies on this machine's disk.
        lengths: tokens of each training example.
        device: what this process trains on.
        world: this process among the workers; all of them get the same budget.
        trials: adapters that train at once on this worker.
        observer: hears the plan.
        engines: workers of which each trains adapters of its own; one where all train the same.

    Raises:
        RefusedError: the job does not fit the device.
    """
    longest, most = int(lengths.max()), _most(job, lengths, world.size // engines, trials)
    try:
        need = replace(
            _need(job, model, longest, most, device, world, trials),
            short=int(np.quantile(lengths, _SHORT)),
            engines=engines,
            examples=Examples(len(lengths), int(lengths.sum()), "exactly"),
        )
        plan = make_plan(need, calibrate=world.leads)
    except UnplannableError as error:
        observer.emit("warning", message=f"{error}. Training goes on without a plan of its memory")
        return _unplanned(job)
    observer.emit("plan", **plan.to_json())
    _refuse_what_cannot_fit(plan)
    return Budget(plan.tokens_per_pass, bool(plan.details["gradient_checkpointing"]))


def check_before_download(
    job: JobConfig, device: torch.device, world: World, trials: int, engines: int = 1
) -> None:
    """Refuse what fits with no data at all, before gigabytes of weights are fetched.

    Raises:
        RefusedError: the base and its adapters do not fit the device.
    """
    if Path(job.model.base).expanduser().exists():
        return
    # Rows of evaluation are data too.
    data = job.data.model_copy(update={"validation": None})
    no_data = job.model_copy(update={"data": data})
    try:
        need = _need(no_data, job.model, _LEAST, _LEAST, device, world, trials)
        plan = make_plan(replace(need, engines=engines), calibrate=False)
    except UnplannableError:
        # Whoever fetches the model says what is wrong with its name.
        return
    _refuse_what_cannot_fit(plan)


def agree(budget: Budget, world: World) -> Budget:
    """One budget for all workers: the least, and recomputed layers where any needs them."""
    (checkpointing,) = world.any(budget.checkpointing)
    return Budget(world.least(budget.tokens), checkpointing)


def apply(budget: Budget, model: Any) -> None:
    """Switch gradient checkpointing on or off; transformers wants training mode for it."""
    model.train()
    if budget.checkpointing:
        model.activation_checkpointing_enable(CHECKPOINTING)
    else:
        model.activation_checkpointing_disable()


def _need(
    job: JobConfig,
    model: ModelConfig,
    longest: int,
    most: int,
    device: torch.device,
    world: World,
    trials: int,
) -> Need:
    shape, cuda = read_shape(model), device.type == "cuda"
    here = machine(None, world.size, cuda, sharing(job), world.beside)
    return Need(shape, here, job, trials, longest, most)


def _most(job: JobConfig, lengths: NDArray[np.int64], workers: int, trials: int) -> int:
    """Tokens of a worker's share of a step, at most (examples are dealt longest first)."""
    count = min(len(lengths), largest_batch(job))
    step = trials * int(np.partition(lengths, -count)[-count:].sum())
    return min(step, step // workers + int(lengths.max()))


def _unplanned(job: JobConfig) -> Budget:
    training = job.training
    tokens = STEP if training.tokens_per_pass == "auto" else training.tokens_per_pass
    checkpointing = training.gradient_checkpointing
    return Budget(tokens, checkpointing is True or checkpointing == "auto")


def _refuse_what_cannot_fit(plan: Plan) -> None:
    if not plan.fits:
        raise RefusedError(refusal(plan))
