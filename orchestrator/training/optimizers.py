"""Optimizers by name; all take one flat float32 parameter."""

import ctypes
from typing import Any

import torch
from torch import nn

from orchestrator.config import TrainingConfig
from orchestrator.errors import RefusedError

_BETAS = (0.9, 0.999)
_EPS = 1e-8
# bitsandbytes counts a parameter's elements in 32 bits.
_MOST_PAGED = 2**31 - 1
# What bitsandbytes keeps in paged memory; the rest is small.
_PAGED = ("state1", "state2")


def resolve(name: str, device: torch.device, parameters: int = 0) -> str:
    """The optimizer that `training.optimizer` means on a device, for an adapter of so many weights.

    Raises:
        RefusedError: a paged optimizer where there is no CUDA, or for more than it can count.
    """
    on_cuda, countable = device.type == "cuda", parameters <= _MOST_PAGED
    if name == "auto":
        return "paged_adamw" if on_cuda and countable else "adamw"
    if name.startswith("paged") and not on_cuda:
        raise RefusedError(
            f"training.optimizer: {name} needs a CUDA device; on this machine take adamw or auto"
        )
    if name.startswith("paged") and not countable:
        raise RefusedError(
            f"training.optimizer: {name} takes at most {_MOST_PAGED} parameters, this adapter has "
            f"{parameters}; take adamw or auto, or set lora.rank lower"
        )
    return name


def build(config: TrainingConfig, parameter: nn.Parameter) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019), paged and 8-bit on CUDA.

    Raises:
        RefusedError: as `resolve`.
    """
    name = resolve(config.optimizer, parameter.device, parameter.numel())
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


def page(optimizer: Any) -> None:
    """Put a state that was loaded into paged memory, as its optimizer does with its own."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in _PAGED:
            buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
            buffer.copy_(state[name])
            state[name] = buffer


def release(optimizer: Any) -> None:
    """Free an optimizer's state where it is paged, which bitsandbytes itself never does."""
    if not getattr(optimizer, "is_paged", False):
        return
    from bitsandbytes.cextension import lib

    known = optimizer.page_mng.paged_tensors
    for state in optimizer.state.values():
        for name in _PAGED:
            buffer = state.get(name)
            if getattr(buffer, "is_paged", False):
                known[:] = [other for other in known if other is not buffer]
                # By the CUDA runtime that bitsandbytes is linked with, which has allocated it.
                lib.cudaFree(ctypes.c_void_p(buffer.data_ptr()))
    optimizer.state.clear()
