"""One fine-tune from base to proven adapter: the same loop in one process and on every worker."""

import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from orchestrator.config import JobConfig, ModelConfig
from orchestrator.data import PreparedData, prepare
from orchestrator.errors import DataError, InterruptedRunError, RefusedError
from orchestrator.model import base as bases
from orchestrator.model import device as devices
from orchestrator.model import source, store
from orchestrator.model.adapters import AdapterSet
from orchestrator.training import budget, course, memory, optimizers, proof
from orchestrator.training.collective import World
from orchestrator.training.course import Course, Ground
from orchestrator.training.engine import Engine
from orchestrator.training.events import Observer

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def run(
    job: JobConfig,
    folder: Path,
    cache_dir: Path,
    device: torch.device | None,
    world: World,
    observer: Observer,
    shared: store.SharedBases | None = None,
) -> dict[str, Any]:
    """Fine-tune, or go on where the newest checkpoint in `folder` ends.

    Args:
        job: the resolved job.
        folder: the run's folder, which all workers reach; checkpoints and adapter lie in it.
        cache_dir: where this machine keeps quantized bases and tokenized data.
        device: what this process trains on; None takes the first GPU, or the CPU.
        world: this process among the workers.
        observer: hears every event, and says when to stop.
        shared: where other machines find what one has quantized; None: there are no others.

    Returns:
        The results of the run, as in the command's `--json` object.

    Raises:
        RefusedError: the model, the data or the settings cannot be trained.
        TrainingError: the loss is not finite.
        InterruptedRunError: the observer asked to stop; a checkpoint was written.
        ProofError: the saved adapter is not what was trained.
    """
    device = device or devices.training_device()
    job = job.model_copy(update={"sweep": None})
    ground = open_ground(job, cache_dir, device, world, observer, shared)
    with world.together():
        state = course.enter(ground, job, folder, observer)
    with world.together():
        course.resume(state)
        course.check_length(state)
    emit_start(state)
    if state.progress.step == 0:
        course.evaluate(state)
        course.sample(state, "before")
    _train(state)
    if state.progress.eval_step != state.progress.step:
        course.evaluate(state)
    course.sample(state, "after")
    results, step = course.results(state), state.progress.step
    if not world.leads:
        return results
    adapter, claim = course.save_adapter(state), course.claim(state)
    entry, dtype = ground.entry, ground.engine.base.dtype
    # On a GPU that holds one base, the trained one must go before a fresh one is loaded.
    del state, ground
    proven = proof.prove_adapter(
        adapter,
        entry,
        device,
        dtype,
        claim,
        lambda message: observer.emit("warning", message=message),
        job.model.trust_remote_code,
    )
    observer.emit(
        "adapter",
        step=step,
        path=results["adapter"],
        eval_loss=results["eval_loss"],
        proof=proven,
    )
    return results


def open_ground(
    job: JobConfig,
    cache_dir: Path,
    device: torch.device,
    world: World,
    observer: Observer,
    shared: store.SharedBases | None = None,
    trials: int = 1,
    engines: int = 1,
) -> Ground:
    """Prepare the data, plan the memory and load the base, on every worker or on none.

    Args:
        job: says which.
        cache_dir: where this machine keeps quantized bases and tokenized data.
        device: what this process trains on.
        world: this process among the workers.
        observer: hears what the user should know.
        shared: where other machines find what one has quantized; None: there are no others.
        trials: adapters that train at once over the base.
        engines: workers of which each trains adapters of its own; one where all train the same.

    Raises:
        RefusedError: the model, the data or the settings cannot be trained, or do not fit.
    """

    def say(message: str) -> None:
        observer.emit("warning", message=message)

    # The data is read before the base is quantized: a bad row is found in seconds, not hours.
    with world.together():
        dtype = devices.compute_dtype(job.quantization.compute_dtype, device)
        optimizers.resolve(job.training.optimizer, device)
        budget.check_before_download(job, device, world, trials, engines)
        origin = source.locate(job.model, cache_dir)
        bases_dir = cache_dir / "bases"
        tokenizer = store.tokenizer(origin, job.quantization, dtype, bases_dir)
        # The 4-bit base has the model's config as well, and it is read faster.
        entry = bases_dir / store.entry_key(origin, job.quantization, dtype)
        described = entry if entry.exists() else origin.path
        limit = source.longest_row(described, job.model)
        data = prepare(job.data, tokenizer, cache_dir / "data", limit)
    observer.emit("data", summary=data.summary())
    shortened = limit is not None and limit < job.data.max_length
    if shortened and (data.counts.cut or data.counts.dropped):
        say(f"The model takes {limit} tokens, so that is the data's max_length")
    # Whether it fits is known in seconds too.
    with world.together():
        model = _config_at(job.model, described)
        lengths = data.train.lengths
        chosen = budget.decide(job, model, lengths, device, world, trials, observer, engines)
    chosen = budget.agree(chosen, world)
    memory.return_freed_memory()
    # Quantized once: by the leader, whose machine's other workers find it in their store; other
    # machines fetch it from where it is shared.
    with world.together():
        if world.leads:
            store.ensure(origin, job.quantization, dtype, bases_dir, say, shared, device)
    with world.together():
        _check_alike(world, store.entry_key(origin, job.quantization, dtype), data)
        entry = store.ensure(origin, job.quantization, dtype, bases_dir, say, shared, device)
        memory.keep_freed_memory()
        memory.reset_peak(device)
        base = bases.load(entry, device, job.model.trust_remote_code)
        _check_lengths(data, base)
    budget.apply(chosen, base.model)
    team = world.alone() if engines > 1 else world
    engine = Engine(
        base, AdapterSet(base.model), team, chosen.tokens, partial(tell_shortened, observer.emit)
    )
    return Ground(entry, data, tokenizer, engine)


def bases_beside(output_dir: Path) -> store.SharedBases:
    """Quantized bases in a folder that all machines share."""
    return store.SharedFolder(output_dir / ".bases")


def _config_at(config: ModelConfig, path: Path) -> ModelConfig:
    """The same model, read from a place on this machine's disk."""
    return config.model_copy(update={"base": str(path), "revision": None})


def tell_shortened(emit: Callable[..., None], before: int, after: int) -> None:
    """Say that passes take fewer tokens from here on, or again as many."""
    emit("budget", tokens_per_pass=after, before=before)
    if after >= before:
        return
    emit(
        "warning",
        message=f"Out of memory: from here on a pass takes at most {after} tokens, not {before}. "
        "The result stays the same",
    )


def _check_alike(world: World, base: str, data: PreparedData) -> None:
    """All workers see the same model and the same rows, or none trains."""
    leading_base, leading_data = world.from_leader((base, data.digest))
    if leading_base != base:
        raise RefusedError(
            "model.base: the workers' machines hold different files under this name, or their GPUs "
            "differ in quantization.compute_dtype: auto; set it, or put the model where all reach "
            "the same"
        )
    if leading_data != data.digest:
        raise DataError(
            "data.train: the workers' machines hold different rows under this name; put the data "
            "where all reach the same"
        )


def _train(state: Course) -> None:
    world, observer = state.ground.world, state.observer
    world.ask = lambda: (observer.stop_requested(), observer.save_requested())
    while not state.done:
        _step(state)
        if course.evaluation_due(state):
            course.evaluate(state)
        stop, gone = world.take_answers()
        if stop or state.done:
            course.save_at_last(state)
        else:
            course.save_if_due(state, gone)
        if stop and not state.done:
            raise InterruptedRunError(
                f"Stopped after step {state.progress.step} of {state.total}; its checkpoint is in "
                f"{state.folder}. Run the same command again to go on"
            )


def _step(state: Course) -> None:
    """One optimizer step; everything around it is reporting."""
    began, waited = time.perf_counter(), state.ground.world.waited
    batch = course.next_batch(state, 0)
    (result,) = state.ground.engine.step([state.tenant], [batch], [state.progress.step + 1])
    seconds = time.perf_counter() - began
    course.take_step(state, result, seconds, state.ground.world.waited - waited)


def _check_lengths(data: PreparedData, base: bases.Base) -> None:
    limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    sets = [data.train] if data.validation is None else [data.train, data.validation]
    longest = max(int(dataset.lengths.max()) for dataset in sets)
    if limit is not None and longest > limit:
        raise DataError(
            f"data.max_length: an example has {longest} tokens, the model takes {limit}. "
            f"Set data.max_length to {limit} or less"
        )


def emit_start(state: Course) -> None:
    """Tell what is about to be trained, and on what."""
    data, engine = state.ground.data, state.ground.engine
    state.observer.emit(
        "start",
        resumed_from=state.progress.step,
        total_steps=state.total,
        workers=state.ground.world.size,
        device=str(engine.base.device),
        base={"name": state.job.model.base, "hash": state.ground.entry.name},
        dataset={
            "name": str(state.job.data.train),
            "digest": data.digest,
            "train_examples": len(data.train),
            "validation_examples": 0 if data.validation is None else len(data.validation),
        },
        environment={
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: version(name) for name in _PACKAGES},
        },
        trainable_parameters=state.tenant.adapter.master.numel(),
        tokens_per_pass=engine.tokens_per_pass,
        gradient_checkpointing=bool(engine.base.model.is_activation_checkpointing),
    )
