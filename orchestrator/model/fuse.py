"""Forward passes of this room for modules of known kinds; all others keep their own.

On a CPU much of the time beside the matrix products goes into small operations and the copies
between them. A module takes part when it is of a known kind and gives the same numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.model import gated, norm, rotary

# Lengths of the segments on which a module's own forward pass and ours are compared.
_LENGTHS = (3, 5)

Forward = Callable[..., Any]


@dataclass(frozen=True)
class _Kind:
    """A kind of module.

    layers: names of its linear layers. matches: whether a module is of the kind. make: our forward
    pass of a module, given its own. try_it: the output of a forward pass on made-up input.
    """

    layers: Sequence[str]
    matches: Callable[[nn.Module], bool]
    make: Callable[[Any, Forward], Forward]
    try_it: Callable[[Any, Forward], Tensor]


def fuse(model: nn.Module, wrap: Callable[[str], Any]) -> None:
    """Give the model's modules of known kinds our forward pass.

    Args:
        model: a base on the CPU; on CUDA nothing is changed.
        wrap: makes the linear layer of a name a `LoraLinear`.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    agreed: dict[type, bool] = {}
    for name, module in list(model.named_modules()):
        kind = next((kind for kind in _KINDS if kind.matches(module)), None)
        if kind is None:
            continue
        for layer in kind.layers:
            wrap(f"{name}.{layer}")
        own, ours = module.forward, kind.make(module, module.forward)
        if type(module) not in agreed:
            agreed[type(module)] = _agree(kind, module, own, ours)
        if agreed[type(module)]:
            module.forward = ours


def _agree(kind: _Kind, module: nn.Module, own: Forward, ours: Forward) -> bool:
    # Training's pass and the one without gradients are two where there is attention.
    with torch.no_grad():
        expected, measured = (kind.try_it(module, pass_).float() for pass_ in (own, ours))
    with torch.enable_grad():
        trained = kind.try_it(module, ours).float().detach()
    rounding = 1e-4 if _dtype(module) == torch.float32 else 2e-2
    allowed = rounding * expected.abs().max()
    return all(bool((expected - got).abs().max() <= allowed) for got in (measured, trained))


def _make_norm(module: Any, own: Forward) -> Forward:
    return lambda hidden_states: norm.rms_norm(module, hidden_states)


def _try_norm(module: Any, forward: Forward) -> Tensor:
    return forward(_numbers(len(module.weight), module.weight.dtype))


def _make_gated(module: Any, own: Forward) -> Forward:
    return lambda x: gated.gated(module, x)


def _try_gated(module: Any, forward: Forward) -> Tensor:
    return forward(_numbers(module.gate_proj.in_features, _dtype(module)))


def _make_rotary(module: Any, own: Forward) -> Forward:
    def forward(
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        segment_lengths: tuple[int, ...] | None = None,
        **options: Any,
    ) -> Any:
        if segment_lengths is not None and rotary.fits(module, segment_lengths):
            return rotary.attend(module, hidden_states, position_embeddings, segment_lengths), None
        return own(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            segment_lengths=segment_lengths,
            **options,
        )

    return forward


def _try_rotary(module: Any, forward: Forward) -> Tensor:
    dtype = _dtype(module)
    angles = torch.linspace(0, 3, sum(_LENGTHS) * (module.head_dim // 2)).view(sum(_LENGTHS), -1)
    angles = torch.cat((angles, angles), -1)[None]
    out, _ = forward(
        hidden_states=_numbers(module.q_proj.in_features, dtype),
        position_embeddings=(angles.cos().to(dtype), angles.sin().to(dtype)),
        attention_mask=None,
        segment_lengths=_LENGTHS,
    )
    return out


def _numbers(width: int, dtype: torch.dtype) -> Tensor:
    """(1, tokens, width), the same on each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, sum(_LENGTHS), width, generator=generator).to(dtype)


def _dtype(module: Any) -> torch.dtype:
    layer = getattr(module, "down_proj", None) or getattr(module, "q_proj", None)
    return module.weight.dtype if layer is None else layer.compute_dtype


_KINDS = (
    _Kind((), norm.is_rms_norm, _make_norm, _try_norm),
    _Kind(gated.LAYERS, gated.is_gated, _make_gated, _try_gated),
    _Kind(rotary.LAYERS, rotary.is_rotary, _make_rotary, _try_rotary),
)
