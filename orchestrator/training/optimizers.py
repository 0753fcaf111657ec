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
# The same moments in torch's words.
_MOMENTS = ("exp_avg", "exp_avg_sq")


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


def translated(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A saved state in an optimizer's own words.

    A run of `auto` may go on on another kind of device: torch's AdamW and the paged one of 32 bit
    keep the same float32 moments under other names.
    """
    of_torch = isinstance(optimizer, torch.optim.AdamW)
    before, now = (_PAGED, _MOMENTS) if of_torch else (_MOMENTS, _PAGED)
    if not set(before) <= state.keys():
        return state
    names = dict(zip(before, now, strict=True))
    step = torch.tensor(float(state["step"])) if of_torch else int(state["step"])
    return {**{names.get(name, name): value for name, value in state.items()}, "step": step}


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
