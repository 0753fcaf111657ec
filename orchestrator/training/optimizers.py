"""Optimizers by name; all take one flat float32 parameter."""

from typing import Any

import torch
from torch import nn

from orchestrator.config import TrainingConfig
from orchestrator.errors import RefusedError

_BETAS = (0.9, 0.999)
_EPS = 1e-8


def resolve(name: str, device: torch.device) -> str:
    """The optimizer that `training.optimizer` means on a device.

    Raises:
        RefusedError: a paged optimizer where there is no CUDA.
    """
    on_cuda = device.type == "cuda"
    if name == "auto":
        return "paged_adamw" if on_cuda else "adamw"
    if name.startswith("paged") and not on_cuda:
        raise RefusedError(
            f"training.optimizer: {name} needs a CUDA device; on this machine take adamw or auto"
        )
    return name


def build(config: TrainingConfig, parameter: nn.Parameter) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019), paged and 8-bit on CUDA."""
    name = resolve(config.optimizer, parameter.device)
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": _BETAS,
        "eps": _EPS,
        "weight_decay": config.weight_decay,
    }
    if name == "adamw":
        return torch.optim.AdamW([parameter], fused=True, **options)
    from bitsandbytes.optim import PagedAdamW8bit, PagedAdamW32bit

    paged = PagedAdamW8bit if name == "paged_adamw_8bit" else PagedAdamW32bit
    return paged([parameter], **options)
