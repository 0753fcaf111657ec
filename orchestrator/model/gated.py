"""A gated feed-forward layer, down(silu(gate(x)) * up(x)), as one function.

It keeps its input and the two inner products; what follows from them is computed again in the
backward pass, for less than it costs to keep it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.model.lora import LoraLinear, back_project, parts, project

# Names of its linear layers.
LAYERS = ("gate_proj", "up_proj", "down_proj")
_SILU = ("SiLU", "SiLUActivation")


def is_gated(module: nn.Module) -> bool:
    """Whether a module looks like a gated feed-forward layer of transformers."""
    return (
        all(isinstance(getattr(module, name, None), (nn.Linear, LoraLinear)) for name in LAYERS)
        and type(getattr(module, "act_fn", None)).__name__ in _SILU
    )


def gated(module: Any, x: Tensor) -> Tensor:
    """The layer's output for x of shape (..., hidden), with its adapters (Shazeer 2020)."""
    function: Any = _Gated.apply
    rows = x.reshape(-1, x.shape[-1])
    layers = (module.gate_proj, module.up_proj, module.down_proj)
    return function(module.gate_proj.placement.anchor, rows, *layers).view(x.shape)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        rows: Tensor,
        gate_proj: LoraLinear,
        up_proj: LoraLinear,
        down_proj: LoraLinear,
    ) -> Tensor:
        ins, outs = (gate_proj, up_proj), (down_proj,)
        ctx.ins, ctx.outs = ins, outs
        ctx.in_parts, ctx.out_parts = parts(ins, len(rows)), parts(outs, len(rows))
        (gate, up), lows = project(ins, rows.to(gate_proj.product_dtype), ctx.in_parts)
        kept = [gate.to(rows.dtype), up.to(rows.dtype)]
        (out,), out_lows = project(outs, F.silu(gate).mul_(up), ctx.out_parts)
        ctx.save_for_backward(rows, *kept, *lows, *out_lows)
        return out.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, *lows = ctx.saved_tensors
        dtype = ctx.ins[0].product_dtype
        gate, up = gate.to(dtype), up.to(dtype)
        active = F.silu(gate)
        in_lows, out_lows = lows[: len(ctx.in_parts)], lows[len(ctx.in_parts) :]
        inner = back_project(ctx.outs, active * up, ctx.out_parts, out_lows, [grad.to(dtype)])
        assert inner is not None
        grads = [torch.ops.aten.silu_backward(inner * up, gate), active.mul_(inner)]
        wide = back_project(
            ctx.ins, rows.to(dtype), ctx.in_parts, in_lows, grads, ctx.needs_input_grad[1]
        )
        return None, None if wide is None else wide.to(grad.dtype), None, None, None
