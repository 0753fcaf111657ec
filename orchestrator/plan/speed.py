"""Expected tokens per second: the step's operations over the device's measured product rate."""

import time
from dataclasses import dataclass
from functools import lru_cache

from orchestrator.plan.fit import Settled, all_trials, largest_batch
from orchestrator.plan.machine import Machine
from orchestrator.plan.parts import target_layers
from orchestrator.processor import cores

# Share of the rate of matrix products that a step reaches; the rest goes to norms, attention,
# dequantization and the optimizer. Set by two jobs on one core with AVX-512 bf16, SmolLM2-135M of
# rank 16 with and without recomputed layers; checked on no other, nor on CUDA.
_SHARE = 0.7


@dataclass(frozen=True)
class Pace:
    """Tokens per second on all devices, and seconds of training all trials.

    rests_on: what they train, in words.
    """

    tokens_per_second: float | None = None
    seconds: float | None = None
    rests_on: str | None = None


def pace(settled: Settled) -> Pace:
    """Time the device's matrix products for a moment and divide."""
    need = settled.need
    rate = product_rate(need.machine.cuda, settled.products, need.shape.hidden)
    speed = _SHARE * rate / operations(settled) * _at_once(need.machine)
    trials, steps, examples = all_trials(need.job), need.steps, need.examples
    if steps is None:
        return Pace(speed)
    batch, length, sure = largest_batch(need.job), float(need.longest), "at most"
    if examples is not None:
        batch, sure = min(batch, examples.count), examples.sure
        length = examples.tokens / examples.count
    rests_on = f"{steps} steps of {batch} examples of {sure} {length:.0f} tokens"
    if need.job.sweep is not None:
        # However many train at a time, they share the devices.
        rests_on = f"at most {trials} trials of {rests_on}"
    return Pace(speed, trials * steps * batch * length / speed, rests_on)


def _at_once(device: Machine) -> int:
    """Devices that are as fast as this process: of those that share its CPU, some wait."""
    if device.cuda:
        return device.gpus
    import torch

    here = max(1, min(device.processes, cores() // torch.get_num_threads()))
    return here * max(1, device.gpus // device.processes)


def operations(settled: Settled) -> float:
    """Floating-point operations for a token that is trained on.

    A frozen weight costs 2 forward and 2 backward, and 2 more where layers are recomputed; an
    adapter's 2 and 4; the head's logits exist once forward and once for the gradient.
    """
    shape, job = settled.need.shape, settled.need.job
    again = 2 if settled.checkpointing else 0
    frozen = sum(layer.weights for layer in shape.linears)
    layers = target_layers(shape, job.lora.target_modules)
    adapters = sum(job.lora.rank * (layer.inputs + layer.outputs) for layer in layers)
    head = shape.vocabulary * shape.hidden
    # Scores and values of causal attention: half the square of the example's length.
    width = sum(la.outputs for la in shape.linears if la.name.endswith("q_proj"))
    attention = 2 * settled.need.longest * width
    return (4 + again) * frozen + (6 + again) * adapters + 4 * head + (3 + again / 2) * attention


@lru_cache(maxsize=8)
def product_rate(cuda: bool, dtype: str, hidden: int) -> float:
    """Operations per second of matrix products of the model's width, the median of a few."""
    import torch

    width = min(2048, max(256, hidden))
    device = "cuda" if cuda else "cpu"
    options = {"dtype": getattr(torch, dtype), "device": device}
    rows, weight = torch.ones(1024, width, **options), torch.ones(4 * width, width, **options)
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        rows @ weight.t()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * rows.numel() * len(weight) / sorted(seconds)[len(seconds) // 2]
