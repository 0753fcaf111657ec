"""The plan's arithmetic against published figures, each with its source."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from orchestrator.plan import plan_job
from orchestrator.plan.machine import CUDA_CONTEXT
from orchestrator.plan.parts import adapter_parameters, base_bytes, constant_bits
from orchestrator.plan.shapes import Shape, read_shape
from tests.unit.test_plan import GIB, make_job

MIB = 2**20


def _shape(base: str) -> Shape:
    return read_shape(make_job(base).model)


def _plan(base: str, memory: int, **sections: Any) -> Any:
    return plan_job(make_job(base, **sections), memory, 1)


def _without_context(plan: Any) -> float:
    return (plan.per_gpu_bytes["total"] - plan.per_gpu_bytes["overhead"]) / GIB


def _llama_7b_base() -> float:
    """With embeddings and head in float32, as its code loads them, and the CUDA context."""
    shape = _shape("huggyllama/llama-7b")
    held = base_bytes(shape, True, True, "bfloat16")
    return (held.packed + held.constants + 2 * held.dense + CUDA_CONTEXT) / MIB


def _torchtune_8b() -> float:
    """Packed rows of 2 x 2048 tokens, rank 8, recomputed layers, AdamW."""
    return _without_context(
        _plan(
            "meta-llama/Llama-3.1-8B",
            24 * GIB,
            lora={"rank": 8},
            data={"train": "x", "max_length": 2048},
            training={"tokens_per_pass": 4096, "gradient_checkpointing": True},
        )
    )


@dataclass(frozen=True)
class Figure:
    """A published figure, what the plan's arithmetic gives for it, and how far off it may be."""

    published: float
    computed: Callable[[], float]
    tolerance: float


FIGURES = {
    # QLoRA (arXiv 2305.14314), section 3, double quantization: 0.5 - 0.127 bits for a parameter.
    "bits saved by double quantization": Figure(
        0.373, lambda: constant_bits(False) - constant_bits(True), 0.002
    ),
    # Abstract and section 1: 16-bit fine-tuning of LLaMA 65B needs more than 780 GB. That is 12
    # bytes for a parameter: weight and gradient in 16 bit, two moments of Adam in 32.
    "GB of 16-bit full fine-tuning of 65B": Figure(
        780, lambda: 12 * _shape("huggyllama/llama-65b").parameters / 1e9, 0.01
    ),
    # 65B weights in 16 bit: 2 bytes each.
    "GB of 65B in 16 bit": Figure(
        130,
        lambda: base_bytes(_shape("huggyllama/llama-65b"), False, False, "bfloat16").total / 1e9,
        0.01,
    ),
    # Section 2: LoRA weights of the usual 0.2% of a 7B model take 26 MB (2 bytes each).
    "MB of 0.2% LoRA weights of 7B": Figure(
        26, lambda: 2 * 0.002 * _shape("huggyllama/llama-7b").parameters / MIB, 0.02
    ),
    # Section 2: the 4-bit base of LLaMA 7B consumes 5,048 MB. The paper does not say how that was
    # measured. The weights come to 3.6 GiB with a 16-bit embedding and head, as we keep them; the
    # figure is met if those are in float32 (as peft's preparation for k-bit training makes them)
    # and the CUDA context is counted in.
    "MB of the 4-bit base of 7B": Figure(5048, _llama_7b_base, 0.10),
    # torchtune's README (pytorch/torchtune at 0031bfb, "Memory and training speed"): 7.4 GiB for
    # QLoRA of Llama 3.1 8B with batch 2, packed to 2048, compiled; rank 8 on all linear layers
    # and recomputed layers by recipes/configs/llama3_1/8B_qlora_single_device.yaml. Theirs holds
    # all logits of the row in bfloat16, 1 GiB; ours a chunk; their compiled layers hold less.
    "GiB of torchtune's QLoRA of Llama 3.1 8B": Figure(7.4, _torchtune_8b, 0.10),
}


@pytest.mark.parametrize("name", FIGURES)
def test_published_figure(name: str) -> None:
    figure = FIGURES[name]
    computed = figure.computed()
    print(f"{name}: published {figure.published}, computed {computed:.4g}")
    assert computed == pytest.approx(figure.published, rel=figure.tolerance)


@pytest.mark.parametrize("rank", [16, 64])
def test_65b_fits_one_gpu_of_48_gb_in_4_bit(rank: int) -> None:
    """Abstract of the paper; with 512 tokens an example, as in its figure 6."""
    settings = {"lora": {"rank": rank}, "data": {"train": "x", "max_length": 512}}
    assert _plan("huggyllama/llama-65b", 48 * GIB, **settings).fits


def test_65b_does_not_fit_it_in_16_bit() -> None:
    plan = _plan("huggyllama/llama-65b", 48 * GIB, quantization={"type": "none"})
    assert not plan.fits
    assert plan.per_gpu_bytes["base"] > 130e9


def test_lora_of_02_percent_is_a_rank_of_ours() -> None:
    """0.2% of LLaMA 7B is what rank 5 or 6 on all linear layers comes to."""
    shape = _shape("huggyllama/llama-7b")
    sizes = [adapter_parameters(shape.linears, rank) for rank in (5, 6)]
    assert sizes[0] < 0.002 * shape.parameters < sizes[1]
