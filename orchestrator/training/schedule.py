"""The learning rate of a step."""

import math

from orchestrator.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (the first is 1).

    It rises linearly to `learning_rate` over `warmup_steps`, then stays, or falls to 0 at the
    last step along a line or half a cosine (Loshchilov and Hutter 2017, equation 5, one cycle).
    """
    warmup = config.warmup_steps
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.scheduler == "constant":
        return config.learning_rate
    done = (step - 1 - warmup) / max(1, total_steps - warmup)
    if config.scheduler == "linear":
        return config.learning_rate * (1 - done)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
