"""How many tokens go into one pass, and whether layers are recomputed."""

from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.config import TrainingConfig
from orchestrator.plan.fit import MOST_TOKENS, STEP
from orchestrator.training.memory import free_bytes

# Share of the free memory that activations may take.
_SHARE = 0.6


@dataclass(frozen=True)
class Budget:
    """Tokens in one pass, and whether gradient checkpointing is on."""

    tokens: int
    checkpointing: bool


def choose(config: TrainingConfig, model: Any, device: torch.device) -> Budget:
    """What the job file says; where it says `auto`, what the device's free memory allows."""
    free = _SHARE * free_bytes(device)
    most = MOST_TOKENS[device.type == "cuda"]
    wanted = most if config.tokens_per_pass == "auto" else config.tokens_per_pass
    checkpointing = config.gradient_checkpointing
    if checkpointing == "auto":
        least = STEP if config.tokens_per_pass == "auto" else wanted
        # Recomputing costs a third of the step; a smaller pass costs less, down to a point.
        checkpointing = free < max(least, wanted // 8) * activation_bytes(model, False)
    if config.tokens_per_pass != "auto":
        return Budget(wanted, checkpointing)
    fit = int(free // activation_bytes(model, checkpointing))
    return Budget(max(STEP, min(most, fit // STEP * STEP)), checkpointing)


def activation_bytes(model: Any, checkpointing: bool) -> int:
    """Bytes that a token's activations take until the backward pass, roughly.

    Counts what autograd keeps in a layer of the Llama kind: the inputs of the norms and of the
    linear layers, queries, keys, values, the attention's output, and the feed-forward products.
    """
    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    width = next(p for p in model.parameters() if p.is_floating_point()).element_size()
    layer = (14 * hidden + 5 * inner) * width
    return layers * hidden * width + layer if checkpointing else layers * layer


def apply(budget: Budget, model: Any) -> None:
    """Switch gradient checkpointing on or off; transformers wants training mode for it."""
    model.train()
    if budget.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
