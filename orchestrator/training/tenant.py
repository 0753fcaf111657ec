"""One adapter in training: its optimizer, its schedule, its gradient scale."""

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.config import TrainingConfig
from orchestrator.model.adapters import Adapter
from orchestrator.training import optimizers
from orchestrator.training.schedule import learning_rate

# Scaled by less, a loss loses nothing to float16 that more would save: what overflows is no scale.
_LEAST_SCALE = 1.0
_WRAPPED = "__bnb_optimizer_quant_state__"


@dataclass(frozen=True)
class Update:
    """What one optimizer step did.

    `applied` is False where float16 gradients overflowed and the step was left out.
    """

    learning_rate: float
    gradient_norm: float
    applied: bool


class Tenant:
    """Trains one adapter; k of them share a base and its passes."""

    def __init__(self, adapter: Adapter, config: TrainingConfig, total_steps: int) -> None:
        self.adapter, self.config, self.total_steps = adapter, config, total_steps
        self.optimizer = optimizers.build(config, adapter.master)
        # Paged memory goes with the last word of its adapter, however training ends.
        weakref.finalize(self, optimizers.release, self.optimizer).atexit = False
        self.scaler = torch.amp.GradScaler(
            adapter.master.device.type, enabled=adapter.working.dtype == torch.float16
        )
        if self.scaler.is_enabled():
            # It has no scale of its own before it has scaled something; losses are scaled by ours.
            self.scaler.scale(torch.ones((), device=adapter.master.device))

    def update(self, step: int) -> Update:
        """Take optimizer step `step` with the gradient summed so far, then clear the gradient."""
        rate = learning_rate(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        master, gradient = self.adapter.master, self.adapter.gradient
        master.grad = gradient
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = gradient.norm().item()
        limit = self.config.max_grad_norm
        if limit is not None and math.isfinite(norm) and norm > limit:
            gradient.mul_(limit / norm)
        applied = math.isfinite(norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif applied:
            self.optimizer.step()
        master.grad = None
        gradient.zero_()
        self.adapter.publish()
        return Update(rate, norm, applied)

    def diverged(self, update: Update) -> bool:
        """Whether a step was left out for a reason that the next ones will meet too.

        In float16 a gradient may overflow now and then; its scale is halved each time.
        """
        if update.applied:
            return False
        return not self.scaler.is_enabled() or self.scaler.get_scale() < _LEAST_SCALE

    def discard(self) -> None:
        """Forget the gradient of a step that is not taken."""
        self.adapter.gradient.zero_()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's tensors by name, on the CPU; empty before the first step."""
        return {
            name: value.detach().cpu().clone()
            for name, value in self._optimizer_state().items()
            if isinstance(value, Tensor)
        }

    def numbers(self) -> dict[str, dict[str, Any]]:
        """The optimizer's and the scaler's plain numbers, for a checkpoint's json."""
        plain = {n: v for n, v in self._optimizer_state().items() if isinstance(v, (int, float))}
        return {"optimizer": plain, "scaler": self.scaler.state_dict()}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, dict[str, Any]]) -> None:
        """Take over what `optimizer_tensors` and `numbers` gave."""
        optimizers.release(self.optimizer)
        content = self.optimizer.state_dict()
        state = optimizers.translated({**tensors, **numbers["optimizer"]}, self.optimizer)
        content["state"] = {0: state} if state else {}
        self.optimizer.load_state_dict(content)
        optimizers.page(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(numbers["scaler"])

    def _optimizer_state(self) -> dict[str, Any]:
        state = dict(self.optimizer.state_dict()["state"].get(0, {}))
        # bitsandbytes wraps what it keeps of a gradient's past, and takes it back unwrapped.
        return {**state, **state.pop(_WRAPPED, {})}
