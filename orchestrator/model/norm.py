"""RMS norm with a frozen weight, in few passes over memory.

The modules of transformers write some ten tensors forward and backward; this one keeps its input,
which the residual stream keeps anyway, and one number a token.
"""

from typing import Any

import torch
from torch import Tensor, nn


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module looks like an RMS norm of transformers."""
    named = type(module).__name__.endswith("RMSNorm") and _epsilon(module) is not None
    weight = getattr(module, "weight", None)
    return named and isinstance(weight, Tensor) and weight.dim() == 1


def rms_norm(module: Any, x: Tensor) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019)."""
    function: Any = _RmsNorm.apply
    return function(x, module.weight, _epsilon(module))


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.float32, copy=True)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return wide.mul_(scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        # With n = x * scale: the gradient of x is scale * (g - n * mean(g * n)), g = grad * weight.
        wide = grad.to(torch.float32, copy=True).mul_(weight.float())
        normed = x.float() * scale
        mean = torch.linalg.vecdot(wide, normed).div_(x.shape[-1]).unsqueeze(-1)
        return wide.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), None, None
