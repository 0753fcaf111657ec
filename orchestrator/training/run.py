"""One fine-tune from base to proven adapter: the same loop in one process and on every worker."""

import gc
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from orchestrator.config import JobConfig
from orchestrator.data import EncodedDataset, PreparedData, prepare
from orchestrator.data.batches import step_indices, total_steps
from orchestrator.errors import (
    CheckpointError,
    DataError,
    InterruptedRunError,
    RefusedError,
    TrainingError,
)
from orchestrator.model import base as bases
from orchestrator.model import device as devices
from orchestrator.model import source, store
from orchestrator.model.adapters import AdapterSet
from orchestrator.training import budget, checkpoint, evaluation, export, memory, optimizers
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.collective import World
from orchestrator.training.engine import Engine
from orchestrator.training.events import Observer
from orchestrator.training.patience import patiently
from orchestrator.training.progress import Progress
from orchestrator.training.rows import Segment
from orchestrator.training.tenant import Tenant

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass
class _Run:
    """What the loop holds in its hands; only `progress` changes, and whether a checkpoint is due.

    overdue: the storage refused the last checkpoint.
    """

    job: JobConfig
    folder: Path
    entry: Path
    data: PreparedData
    tokenizer: Any
    engine: Engine
    tenant: Tenant
    world: World
    observer: Observer
    total: int
    progress: Progress = field(default_factory=Progress)
    overdue: bool = False

    @property
    def identity(self) -> dict[str, str]:
        return {"base": self.entry.name, "data": self.data.digest}


@dataclass(frozen=True)
class _Claim:
    """What the trained model says to one example, and where its adapter lies."""

    adapter: Path
    entry: Path
    dtype: torch.dtype
    ids: torch.Tensor
    logits: torch.Tensor


def run(
    job: JobConfig,
    folder: Path,
    cache_dir: Path,
    device: torch.device | None,
    world: World,
    observer: Observer,
) -> dict[str, Any]:
    """Fine-tune, or go on where the newest checkpoint in `folder` ends.

    Args:
        job: the resolved job.
        folder: the run's folder, which all workers reach; checkpoints and adapter lie in it.
        cache_dir: where this machine keeps quantized bases and tokenized data.
        device: what this process trains on; None takes the first GPU, or the CPU.
        world: this process among the workers.
        observer: hears every event, and says when to stop.

    Returns:
        The results of the run, as in the command's `--json` object.

    Raises:
        RefusedError: the model, the data or the settings cannot be trained.
        TrainingError: the loss is not finite.
        InterruptedRunError: the observer asked to stop; a checkpoint was written.
        ProofError: the saved adapter is not what was trained.
    """
    device = device or devices.training_device()
    memory.keep_freed_memory()
    memory.reset_peak(device)
    state = _open(job, folder, cache_dir, device, world, observer)
    with world.together():
        _resume(state)
    _emit_start(state, device)
    if state.progress.step == 0:
        _evaluate(state)
        _sample(state, "before")
    _train(state)
    if state.progress.eval_step != state.progress.step:
        _evaluate(state)
    _sample(state, "after")
    results, step = _results(state, device), state.progress.step
    if not world.leads:
        return results
    claim = _save_adapter(state)
    # On a GPU that holds one base, the trained one must go before a fresh one is loaded.
    del state
    proof = _prove(claim, device)
    observer.emit(
        "adapter",
        step=step,
        path=results["adapter"],
        eval_loss=results["eval_loss"],
        proof=proof,
    )
    return results


def _open(
    job: JobConfig,
    folder: Path,
    cache_dir: Path,
    device: torch.device,
    world: World,
    observer: Observer,
) -> _Run:
    say = _teller(observer)
    # The data is read before the base is quantized: a bad row is found in seconds, not hours.
    with world.together():
        dtype = devices.compute_dtype(job.quantization.compute_dtype, device)
        optimizers.resolve(job.training.optimizer, device)
        origin = source.locate(job.model, cache_dir)
        bases_dir = cache_dir / "bases"
        tokenizer = store.tokenizer(origin, job.quantization, dtype, bases_dir)
        data = prepare(job.data, tokenizer, cache_dir / "data")
    observer.emit("data", summary=data.summary())
    # Quantized once: by the leader, whose machine's other workers find it in their store; other
    # machines fetch it from beside the run.
    shared = folder.parent / ".bases" if world.nodes > 1 else None
    with world.together():
        if world.leads:
            store.ensure(origin, job.quantization, dtype, bases_dir, say, shared)
    with world.together():
        _check_alike(world, store.entry_key(origin, job.quantization, dtype), data)
        entry = store.ensure(origin, job.quantization, dtype, bases_dir, say, shared)
        state = _assemble(job, folder, entry, data, tokenizer, device, world, observer)
    return state


def _assemble(
    job: JobConfig,
    folder: Path,
    entry: Path,
    data: PreparedData,
    tokenizer: Any,
    device: torch.device,
    world: World,
    observer: Observer,
) -> _Run:
    """Load the base and put a fresh adapter on it."""
    base = bases.load(entry, device, job.model.trust_remote_code)
    _check_lengths(data, base)
    adapters = AdapterSet(base.model)
    adapter = adapters.add(job.lora, job.training.seed)
    chosen = budget.choose(job.training, base.model, device)
    budget.apply(chosen, base.model)
    training = job.training
    total = total_steps(len(data.train), training.batch_size, training.epochs, training.max_steps)
    return _Run(
        job=job,
        folder=folder,
        entry=entry,
        data=data,
        tokenizer=tokenizer,
        engine=Engine(base, adapters, world, chosen.tokens),
        tenant=Tenant(adapter, training, total),
        world=world,
        observer=observer,
        total=total,
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


def _resume(state: _Run) -> None:
    """Take over the newest whole checkpoint; the leader decides which that is."""
    folder, found = state.folder / "checkpoints", None
    if state.world.leads:
        found = checkpoint.newest(folder, _teller(state.observer))
    step = state.world.from_leader(None if found is None else found.step)
    if step is None:
        return
    found = found or checkpoint.read(folder, step)
    if found.state["identity"] != state.identity:
        raise RefusedError(
            f"{state.folder} holds a run of another base or other data (its content changed). "
            "Give the job another name, or delete that folder"
        )
    state.tenant.adapter.load_state(found.tensors["adapter"])
    state.tenant.restore(found.tensors["optimizer"], found.state["numbers"])
    state.progress = Progress(**found.state["progress"])


def _train(state: _Run) -> None:
    evaluation_every, checkpoint_every = state.job.evaluation.every, state.job.checkpoint.every
    while state.progress.step < state.total:
        step = state.progress.step + 1
        _step(state, step)
        if step % evaluation_every == 0 or step == state.total:
            _evaluate(state)
        stop, leave = state.world.any(
            state.observer.stop_requested(), state.observer.save_requested()
        )
        best = state.progress.best_step == step
        if stop or step == state.total:
            _save_at_last(state)
        elif leave or best or state.overdue or step % checkpoint_every == 0:
            _try_to_save(state)
        if stop and step < state.total:
            raise InterruptedRunError(
                f"Stopped after step {step} of {state.total}; its checkpoint is in {state.folder}. "
                "Run the same command again to go on"
            )


def _step(state: _Run, step: int) -> None:
    """One optimizer step; everything around it is reporting."""
    began, waited = time.perf_counter(), state.world.waited
    training = state.job.training
    dataset = state.data.train
    indices = step_indices(len(dataset), training.batch_size, training.seed, step)
    first_key = (step - 1) * training.batch_size
    batch = [Segment(0, first_key + place, dataset[int(i)]) for place, i in enumerate(indices)]
    (result,) = state.engine.step([state.tenant], [batch], step)
    if result.update is None:
        raise TrainingError(
            f"The loss of step {step} is {result.loss}; nothing was changed by it. Lower "
            "training.learning_rate (now "
            f"{training.learning_rate}) or training.max_grad_norm, or look at the data of this "
            f"step; the last checkpoint is in {state.folder}"
        )
    seconds = time.perf_counter() - began
    state.progress = state.progress.stepped(result.loss, result.tokens, seconds)
    state.observer.emit(
        "step",
        step=step,
        loss=result.loss,
        learning_rate=result.update.learning_rate,
        gradient_norm=result.update.gradient_norm,
        tokens=result.tokens,
        target_tokens=result.target_tokens,
        tokens_per_second=result.tokens / seconds,
        seconds=seconds,
        collective_seconds=state.world.waited - waited,
        memory_bytes=memory.used_bytes(state.engine.base.device),
    )


def _evaluate(state: _Run) -> None:
    if state.data.validation is None:
        return
    loss = evaluation.eval_loss(state.engine, state.tenant.adapter, state.data.validation)
    state.progress = state.progress.evaluated(loss)
    state.observer.emit(
        "evaluation",
        step=state.progress.step,
        eval_loss=loss,
        perplexity=float(torch.tensor(loss, dtype=torch.float64).exp()),
    )


def _sample(state: _Run, when: str) -> None:
    count, dataset = state.job.evaluation.samples, state.data.validation
    if not count or dataset is None or not state.world.leads:
        return
    for sample in evaluation.samples(
        state.engine, state.tenant.adapter, dataset, count, state.tokenizer
    ):
        state.observer.emit("sample", when=when, step=state.progress.step, **vars(sample))


def _try_to_save(state: _Run) -> None:
    """Write a checkpoint; where the storage refuses it, say so, and try again after each step."""
    try:
        _save(state)
        state.overdue = False
    except CheckpointError as error:
        if not state.overdue:
            state.observer.emit("warning", message=f"{error}. Training goes on meanwhile")
        state.overdue = True


def _save_at_last(state: _Run) -> None:
    """Write a checkpoint that nothing comes after, patiently."""
    with state.world.together():
        patiently(lambda: _save(state), _teller(state.observer))


def _save(state: _Run) -> None:
    if not state.world.leads:
        return
    began = time.perf_counter()
    folder = state.folder / "checkpoints"
    path = checkpoint.write(
        folder,
        Checkpoint(
            state.progress.step,
            {
                "adapter": state.tenant.adapter.state(),
                "optimizer": state.tenant.optimizer_tensors(),
            },
            {
                "progress": state.progress.to_json(),
                "numbers": state.tenant.numbers(),
                "identity": state.identity,
            },
        ),
    )
    checkpoint.prune(folder, state.job.checkpoint.keep, state.progress.best_step)
    state.observer.emit(
        "checkpoint",
        step=state.progress.step,
        path=str(path),
        seconds=time.perf_counter() - began,
    )


def _results(state: _Run, device: torch.device) -> dict[str, Any]:
    progress = state.progress
    if progress.step == 0:
        raise TrainingError("No step was trained, so there is no adapter")
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "initial_eval_loss": progress.initial_eval_loss,
        "eval_loss": progress.eval_loss,
        "train_loss": progress.train_loss,
        "tokens_per_second": progress.tokens_per_second,
        "peak_memory_bytes": memory.peak_bytes(device),
        "workers": state.world.size,
        "adapter": str(state.folder / "adapter"),
    }


def _save_adapter(state: _Run) -> _Claim:
    """Save the adapter, and keep what the trained model says so that it can be proved."""
    base, adapter = state.engine.base, state.tenant.adapter
    patiently(
        lambda: export.save_adapter(adapter, base, state.job.model.base, state.folder / "adapter"),
        _teller(state.observer),
    )
    example = _shortest(state.data.validation or state.data.train)
    ids, logits = export.proof_logits(base, state.engine.adapters, adapter, example)
    return _Claim(state.folder / "adapter", state.entry, base.dtype, ids, logits)


def _prove(claim: _Claim, device: torch.device) -> dict[str, float]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return export.prove_adapter(
        claim.adapter, claim.entry, device, claim.dtype, claim.ids, claim.logits
    )


def _shortest(dataset: EncodedDataset) -> Any:
    """A short example of the first few, to prove the adapter with."""
    examples = [dataset[index] for index in range(min(8, len(dataset)))]
    return min(examples, key=lambda example: len(example.ids))


def _check_lengths(data: PreparedData, base: bases.Base) -> None:
    limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    sets = [data.train] if data.validation is None else [data.train, data.validation]
    longest = max(int(dataset.lengths.max()) for dataset in sets)
    if limit is not None and longest > limit:
        raise DataError(
            f"data.max_length: an example has {longest} tokens, the model takes {limit}. "
            f"Set data.max_length to {limit} or less"
        )


def _emit_start(state: _Run, device: torch.device) -> None:
    data = state.data
    state.observer.emit(
        "start",
        resumed_from=state.progress.step,
        total_steps=state.total,
        workers=state.world.size,
        device=str(device),
        base={"name": state.job.model.base, "hash": state.entry.name},
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
        tokens_per_pass=state.engine.tokens_per_pass,
        gradient_checkpointing=bool(state.engine.base.model.is_activation_checkpointing),
    )


def _teller(observer: Observer) -> Any:
    return lambda message: observer.emit("warning", message=message)
