"""One adapter's course through its job: its steps, evaluations, checkpoints and its end.

A plain fine-tune is one course over a base; a sweep's trials are several over the same one.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.config import JobConfig
from orchestrator.data import EncodedDataset, PreparedData
from orchestrator.data.batches import step_indices, total_steps
from orchestrator.errors import CheckpointError, RefusedError, TrainingError
from orchestrator.training import checkpoint, evaluation, export, memory, proof
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.collective import World
from orchestrator.training.engine import Engine, StepResult
from orchestrator.training.events import Observer
from orchestrator.training.patience import patiently
from orchestrator.training.progress import Progress, perplexity
from orchestrator.training.proof import Claim
from orchestrator.training.rows import Segment
from orchestrator.training.tenant import Tenant


@dataclass(frozen=True)
class Ground:
    """What all adapters over one base share. `entry` is the base's folder in the store."""

    entry: Path
    data: PreparedData
    tokenizer: Any
    engine: Engine

    @property
    def world(self) -> World:
        """This process among the workers."""
        return self.engine.world

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint must have been made with."""
        return {"base": self.entry.name, "data": self.data.digest}


@dataclass
class Course:
    """One adapter in training; only `progress` changes, and whether a checkpoint is due.

    total: optimizer steps of the whole job. overdue: the storage refused the last checkpoint.
    forked_from: the origin of the last fork that it went on from.
    """

    ground: Ground
    job: JobConfig
    folder: Path
    tenant: Tenant
    observer: Observer
    total: int
    progress: Progress = field(default_factory=Progress)
    overdue: bool = False
    forked_from: str | None = None

    @property
    def done(self) -> bool:
        """Whether the last step is trained."""
        return self.progress.step >= self.total

    def say(self, message: str) -> None:
        """Tell the user."""
        self.observer.emit("warning", message=message)


def enter(ground: Ground, job: JobConfig, folder: Path, observer: Observer) -> Course:
    """Put a fresh adapter on the base.

    Raises:
        ModelError: a target module does not exist in the base.
        RefusedError: the job ends within its warm-up.
    """
    training = job.training
    total = total_steps(
        len(ground.data.train), training.batch_size, training.epochs, training.max_steps
    )
    if training.warmup_steps > total:
        raise RefusedError(
            f"training.warmup_steps ({training.warmup_steps}) is over the {total} steps of the "
            "whole job. Lower it, or raise training.epochs"
        )
    adapter = ground.engine.adapters.add(job.lora, training.seed)
    try:
        tenant = Tenant(adapter, training, total)
    except BaseException:
        ground.engine.adapters.remove(adapter)
        raise
    return Course(ground, job, folder, tenant, observer, total)


def leave(course: Course) -> None:
    """Take the adapter off the base."""
    course.ground.engine.adapters.remove(course.tenant.adapter)


def resume(course: Course, origin: str | None = None) -> None:
    """Take over the newest whole checkpoint; the leader decides which that is.

    Args:
        course: fresh.
        origin: the fork that it has to go on from; a checkpoint from before that is passed over.

    Raises:
        RefusedError: it is of another base or other data.
        CheckpointError: a worker cannot read what the leader can.
    """
    world, folder, found = course.ground.world, course.folder / "checkpoints", None
    if world.leads:
        found = checkpoint.newest(folder, course.say)
    step = world.from_leader(None if found is None else found.step)
    if step is None:
        return
    found = found or checkpoint.read(folder, step)
    if found.state["identity"] != course.ground.identity:
        raise RefusedError(
            f"{course.folder} holds a run of another base or other data (its content changed). "
            "Give the job another name, or delete that folder"
        )
    forked_from = found.state.get("forked_from")
    if origin is not None and forked_from != origin:
        # It may be of another rank.
        return
    take_over(course, found)
    course.progress, course.forked_from = Progress(**found.state["progress"]), forked_from


def check_length(course: Course) -> None:
    """What was trained is not undone by a job of fewer steps.

    Raises:
        RefusedError: the present step is beyond the job's last.
    """
    step = course.progress.step
    if step > course.total:
        raise RefusedError(
            f"{course.folder} has trained {step} steps already, the job has {course.total} in all. "
            "Give it as many, or another name"
        )


def take_over(course: Course, found: Checkpoint) -> None:
    """Go on with a checkpoint's weights and optimizer."""
    course.tenant.adapter.load_state(found.tensors["adapter"])
    course.tenant.restore(found.tensors["optimizer"], found.state["numbers"])


def fork(course: Course, path: Path, origin: str | None) -> None:
    """Go on from another adapter's checkpoint; the leader decides which that is.

    Where the other one has gone on from elsewhere meanwhile, and its checkpoint went with that, its
    newest takes the place, if that is still of an adapter such as this one.

    Args:
        course: of an adapter of the same shape.
        path: the checkpoint's folder.
        origin: tells this fork from others.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    world, found, gone = course.ground.world, None, ""
    if world.leads:
        try:
            found = checkpoint.read_path(path)
        except CheckpointError as error:
            found, gone = checkpoint.newest(path.parent, course.say), str(error)
            if found is not None and found.state.get("lora") != _lora(course):
                found = None
    step, gone = world.from_leader((found and found.step, gone))
    if step is None:
        raise CheckpointError(gone)
    found = found or checkpoint.read(path.parent, step)
    take_over(course, found)
    course.progress = Progress(**found.state["progress"])
    course.forked_from = origin
    if course.ground.world.leads:
        # What it had trained before is not where it goes on after a kill.
        checkpoint.forget_after(course.folder / "checkpoints", found.step)


def next_batch(course: Course, place: int) -> list[Segment]:
    """The examples of the next optimizer step, as those of tenant `place`."""
    training, dataset = course.job.training, course.ground.data.train
    step = course.progress.step + 1
    indices = step_indices(len(dataset), training.batch_size, training.seed, step)
    first_key = (step - 1) * training.batch_size
    return [Segment(place, first_key + n, dataset[int(i)]) for n, i in enumerate(indices)]


def take_step(course: Course, result: StepResult, seconds: float, waited: float) -> None:
    """Report an optimizer step that was trained.

    Args:
        course: whose step it was.
        result: what the engine made of it.
        seconds: what it took.
        waited: seconds of these in the collective.

    Raises:
        TrainingError: the loss is not finite.
    """
    step = course.progress.step + 1
    if result.update is None:
        raise TrainingError(
            f"The loss of step {step} is {result.loss}; nothing was changed by it. Lower "
            f"training.learning_rate (now {course.job.training.learning_rate}) or "
            "training.max_grad_norm under another name, or look at the data of this step; the "
            f"last checkpoint is in {course.folder}"
        )
    if course.tenant.diverged(result.update):
        raise TrainingError(
            f"The gradient of step {step} is not finite; nothing was changed by it. Lower "
            f"training.learning_rate (now {course.job.training.learning_rate}) under another "
            "name, take quantization.compute_dtype: float32, or look at the data of this step; "
            f"the last checkpoint is in {course.folder}"
        )
    course.progress = course.progress.stepped(result.loss, result.tokens, seconds)
    course.observer.emit(
        "step",
        step=step,
        loss=result.loss,
        learning_rate=result.update.learning_rate,
        gradient_norm=result.update.gradient_norm,
        tokens=result.tokens,
        target_tokens=result.target_tokens,
        tokens_per_second=result.tokens / seconds,
        seconds=seconds,
        collective_seconds=waited,
        memory_bytes=memory.used_bytes(course.ground.engine.base.device),
    )


def evaluation_due(course: Course) -> bool:
    """Whether the job wants the eval loss at the present step."""
    step = course.progress.step
    return step % course.job.evaluation.every == 0 or course.done


def evaluate(course: Course, known: float | None = None) -> None:
    """Report the eval loss at the present step; `known` where it was computed before."""
    dataset = course.ground.data.validation
    if dataset is None:
        return
    loss = known
    if loss is None:
        loss = evaluation.eval_loss(course.ground.engine, course.tenant.adapter, dataset)
    course.progress = course.progress.evaluated(loss)
    course.observer.emit(
        "evaluation",
        step=course.progress.step,
        eval_loss=loss,
        perplexity=perplexity(loss),
    )


def sample(course: Course, when: str) -> None:
    """Report answers to the first held-out prompts."""
    ground, count = course.ground, course.job.evaluation.samples
    if not count or ground.data.validation is None or not ground.world.leads:
        return
    for answer in evaluation.samples(
        ground.engine, course.tenant.adapter, ground.data.validation, count, ground.tokenizer
    ):
        course.observer.emit("sample", when=when, step=course.progress.step, **vars(answer))


def save_if_due(course: Course, asked: bool = False) -> None:
    """Write a checkpoint where the job wants one, or someone asks for it.

    Where the storage refuses it, say so, and try again after each step.
    """
    step = course.progress.step
    best = course.progress.best_step == step
    if not (asked or best or course.overdue or step % course.job.checkpoint.every == 0):
        return
    try:
        save(course)
        course.overdue = False
    except CheckpointError as error:
        if not course.overdue:
            course.say(f"{error}. Training goes on meanwhile")
        course.overdue = True


def save_at_last(course: Course) -> None:
    """Write a checkpoint that nothing comes after, patiently."""
    with course.ground.world.together():
        patiently(lambda: save(course), course.say)


def save(course: Course) -> None:
    """Write a checkpoint; only the leader does.

    Raises:
        CheckpointError: the storage refuses it.
    """
    if not course.ground.world.leads:
        return
    began = time.perf_counter()
    # A machine that loses power keeps the checkpoint, so it must keep the steps before it.
    course.observer.sync()
    folder, tenant, step = course.folder / "checkpoints", course.tenant, course.progress.step
    path = checkpoint.write(
        folder,
        Checkpoint(
            step,
            {"adapter": tenant.adapter.state(), "optimizer": tenant.optimizer_tensors()},
            {
                "progress": course.progress.to_json(),
                "numbers": tenant.numbers(),
                "identity": course.ground.identity,
                "lora": _lora(course),
                "forked_from": course.forked_from,
            },
        ),
    )
    checkpoint.prune(folder, step, course.job.checkpoint.keep, course.progress.best_step)
    seconds = time.perf_counter() - began
    course.observer.emit("checkpoint", step=step, path=str(path), seconds=seconds)


def _lora(course: Course) -> dict[str, Any]:
    """What its adapter is, as JSON has it."""
    return course.job.lora.model_dump(mode="json")


def adapter_path(course: Course) -> Path:
    """Where its adapter is saved."""
    return course.folder / "adapter"


def save_adapter(course: Course) -> Path:
    """Save the adapter as a PEFT folder, patiently."""
    adapter, base = course.tenant.adapter, course.ground.engine.base
    path = adapter_path(course)
    patiently(lambda: export.save_adapter(adapter, base, course.job.model.base, path), course.say)
    return path


def claim(course: Course) -> Claim:
    """What its trained model says, of which the saved adapter is the proof."""
    engine, data = course.ground.engine, course.ground.data
    example = shortest_example(data.validation or data.train)
    return proof.claim(engine.base, engine.adapters, course.tenant.adapter, example)


def results(course: Course) -> dict[str, Any]:
    """The results of the course, as in the command's `--json` object.

    Raises:
        TrainingError: no step was trained.
    """
    progress, device = course.progress, course.ground.engine.base.device
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
        "workers": course.ground.world.size,
        "adapter": str(course.folder / "adapter"),
    }


def summary(course: Course) -> dict[str, Any]:
    """What a trial came to, whether it was trained to its end or not."""
    progress = course.progress
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "eval_loss": progress.eval_loss,
        "train_loss": progress.train_loss,
    }


def shortest_example(dataset: EncodedDataset) -> Any:
    """A short example of the first few, to prove an adapter with."""
    examples = [dataset[index] for index in range(min(8, len(dataset)))]
    return min(examples, key=lambda example: len(example.ids))
