"""Segmented attention against torch's own, one segment at a time."""

import pytest
import torch
import torch.nn.functional as F

from orchestrator.model.attention import DENSE_LIMIT, segmented_attention

MODULE = torch.nn.Identity()


def _inputs(tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, 6, tokens, 8), (1, 2, tokens, 8), (1, 2, tokens, 8)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _reference(
    inputs: list[torch.Tensor],
    lengths: tuple[int, ...],
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    query, key, value = inputs
    key, value = (t.repeat_interleave(3, 1) for t in (key, value))
    total = sum(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(total)[:, None] - torch.arange(total)[None, :]
    seen = (owner[:, None] == owner[None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    scores = query @ key.transpose(2, 3) * 8**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("lengths", [(7,), (5, 1, 9), (3, DENSE_LIMIT + 4, 2)])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"softcap": 2.0}])
def test_segments_attend_within_themselves(lengths: tuple[int, ...], options: dict) -> None:
    inputs = _inputs(sum(lengths), torch.float32)
    out, _ = segmented_attention(MODULE, *inputs, None, segment_lengths=lengths, **options)
    expected = _reference(inputs, lengths, options.get("sliding_window"), options.get("softcap"))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(expected)
    own = torch.autograd.grad(out, inputs, grad)
    reference = torch.autograd.grad(expected, inputs, grad)
    for a, b in zip(own, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_scaling_is_the_models_own() -> None:
    query, key, value = _inputs(12, torch.float32)
    out, _ = segmented_attention(MODULE, query, key, value, None, scaling=0.5)
    expected = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
