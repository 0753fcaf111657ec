"""The plan's arithmetic beside published figures: `python -m tests.benchmarks.published`

Prints a table, each figure with its source; exits 1 where one is further off than it may be.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.config import JobConfig
from orchestrator.jobfile import job_from_mapping
from orchestrator.plan import Plan, plan_job
from orchestrator.plan.machine import CUDA_CONTEXT
from orchestrator.plan.parts import base_bytes, constant_bits
from orchestrator.plan.shapes import Shape, read_shape

MIB, GIB = 2**20, 2**30
LLAMA_7B, LLAMA_65B = "huggyllama/llama-7b", "huggyllama/llama-65b"
_QLORA = "QLoRA, arXiv 2305.14314"


@dataclass(frozen=True)
class Figure:
    """A published figure, what the plan's arithmetic gives for it, and how far off it may be."""

    published: float
    computed: Callable[[], float]
    tolerance: float
    source: str


@dataclass(frozen=True)
class Verdict:
    """Whether a job was said to fit one GPU."""

    fits: bool
    memory: int
    base: str
    sections: dict[str, Any]
    source: str


def shape(base: str) -> Shape:
    """The shape of a base by its hub id."""
    return read_shape(_job(base).model)


def plan(base: str, memory: int, **sections: Any) -> Plan:
    """The plan of a job on one GPU."""
    return plan_job(_job(base, **sections), memory, 1)


def _job(base: str, **sections: Any) -> JobConfig:
    job = {"name": "plan", "model": {"base": base}, "data": {"train": "none.jsonl"}, **sections}
    return job_from_mapping(job)


def _llama_7b_base() -> float:
    """With embeddings and head in float32, as its code loads them, and the CUDA context."""
    held = base_bytes(shape(LLAMA_7B), True, True, "bfloat16")
    return (held.packed + held.constants + 2 * held.dense + CUDA_CONTEXT) / MIB


def _torchtune_8b() -> float:
    """Packed rows of 2 x 2048 tokens, rank 8, recomputed layers, AdamW; without the context."""
    parts = plan(
        "meta-llama/Llama-3.1-8B",
        24 * GIB,
        lora={"rank": 8},
        data={"train": "x", "max_length": 2048},
        training={"tokens_per_pass": 4096, "gradient_checkpointing": True},
    ).per_gpu_bytes
    return (parts["total"] - parts["overhead"]) / GIB


FIGURES = {
    # Double quantization: 0.5 - 0.127 bits for a parameter.
    "bits saved by double quantization": Figure(
        0.373,
        lambda: constant_bits(False) - constant_bits(True),
        0.002,
        f"{_QLORA}, section 3",
    ),
    # 16-bit fine-tuning of LLaMA 65B needs more than 780 GB. That is 12 bytes for a parameter:
    # weight and gradient in 16 bit, two moments of Adam in 32.
    "GB of 16-bit full fine-tuning of 65B": Figure(
        780,
        lambda: 12 * shape(LLAMA_65B).parameters / 1e9,
        0.01,
        f"{_QLORA}, abstract and section 1",
    ),
    # 65B weights in 16 bit: 2 bytes each.
    "GB of 65B in 16 bit": Figure(
        130,
        lambda: base_bytes(shape(LLAMA_65B), False, False, "bfloat16").total / 1e9,
        0.01,
        f"{_QLORA}, 2 bytes for each of its parameters",
    ),
    # LoRA weights of the usual 0.2% of a 7B model take 26 MB (2 bytes each).
    "MB of 0.2% LoRA weights of 7B": Figure(
        26,
        lambda: 2 * 0.002 * shape(LLAMA_7B).parameters / MIB,
        0.02,
        f"{_QLORA}, section 2",
    ),
    # The 4-bit base of LLaMA 7B consumes 5,048 MB. The paper does not say how that was measured.
    # The weights come to 3.6 GiB with a 16-bit embedding and head, as we keep them; the figure is
    # met if those are in float32 (as peft's preparation for k-bit training makes them) and the
    # CUDA context is counted in.
    "MB of the 4-bit base of 7B": Figure(
        5048, _llama_7b_base, 0.10, f"{_QLORA}, section 2"
    ),
    # QLoRA of Llama 3.1 8B with batch 2, packed to 2048, compiled; rank 8 on all linear layers and
    # recomputed layers by recipes/configs/llama3_1/8B_qlora_single_device.yaml. Theirs holds all
    # logits of the row in bfloat16, 1 GiB; ours a chunk; their compiled layers hold less.
    "GiB of torchtune's QLoRA of Llama 3.1 8B": Figure(
        7.4,
        _torchtune_8b,
        0.10,
        'torchtune\'s README (pytorch/torchtune at 0031bfb), "Memory and training speed"',
    ),
}  # fmt: skip

# With 512 tokens an example, as in the paper's figure 6.
_SHORT = {"data": {"train": "x", "max_length": 512}}
VERDICTS = {
    **{
        f"65B in 4 bit, rank {rank}, on 48 GB": Verdict(
            True, 48 * GIB, LLAMA_65B, {"lora": {"rank": rank}, **_SHORT}, f"{_QLORA}, abstract"
        )
        for rank in (16, 64)
    },
    "65B in 16 bit on 48 GB": Verdict(
        False, 48 * GIB, LLAMA_65B, {"quantization": {"type": "none"}}, f"{_QLORA}, abstract"
    ),
}


def main() -> None:
    """Print the table."""
    off = False
    print(f"{'figure':<44}{'published':>14}{'planned':>14}  source")
    for name, figure in FIGURES.items():
        computed = figure.computed()
        off |= abs(computed / figure.published - 1) > figure.tolerance
        print(f"{name:<44}{figure.published:>14,.4g}{computed:>14,.4g}  {figure.source}")
    for name, verdict in VERDICTS.items():
        fits = plan(verdict.base, verdict.memory, **verdict.sections).fits
        off |= fits != verdict.fits
        print(f"{name:<44}{_said(verdict.fits):>14}{_said(fits):>14}  {verdict.source}")
    sys.exit(off)


def _said(fits: bool) -> str:
    return "fits" if fits else "does not fit"


if __name__ == "__main__":
    main()
