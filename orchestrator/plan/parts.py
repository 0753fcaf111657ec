"""Bytes of everything that stays between steps: base, adapters, gradients, optimizer."""

from dataclasses import dataclass

from orchestrator.config import JobConfig
from orchestrator.errors import ModelError, RefusedError
from orchestrator.plan.machine import Machine
from orchestrator.plan.shapes import Linear, Shape

WIDTH = {"bfloat16": 2, "float16": 2, "float32": 4}
# bitsandbytes: one constant for 64 weights; with double quantization those are 8-bit with a
# float32 for 256 of them (QLoRA, arXiv 2305.14314, section 3).
BLOCK, NESTED_BLOCK = 64, 256
# A layer's tables: 16 float32 values of the 4-bit type, 256 of the constants' type, an offset.
_TABLE, _NESTED_TABLE = 16 * 4, 256 * 4 + 4
# AdamW's two float32 moments (Loshchilov and Hutter 2019). In 8 bit (Dettmers et al., arXiv
# 2110.02861) each is a byte with a float32 for 256 elements.
_MOMENTS, _MOMENTS_8BIT = 8.0, 2 * (1 + 4 / 256)


@dataclass(frozen=True)
class BaseBytes:
    """The frozen base: 4-bit weights, their constants, and all that stays dense."""

    packed: int
    constants: int
    dense: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.packed + self.constants + self.dense


def compute_dtype(job: JobConfig, machine: Machine) -> str:
    """The dtype of the matrix products.

    Raises:
        RefusedError: float16 on a CPU.
    """
    name = job.quantization.compute_dtype
    if name == "auto":
        fallback = "float16" if machine.cuda else "float32"
        return "bfloat16" if machine.bfloat16 else fallback
    if name == "float16" and not machine.cuda:
        raise RefusedError(
            "quantization.compute_dtype: float16 needs a GPU; take bfloat16, float32 or auto"
        )
    return name


def constant_bits(double_quant: bool) -> float:
    """Bits of quantization constants for a weight: 0.5, or 0.127 when quantized themselves."""
    return 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK) if double_quant else 32 / BLOCK


def base_bytes(shape: Shape, quantized: bool, double_quant: bool, dtype: str) -> BaseBytes:
    """Bytes of the base as bitsandbytes and transformers hold it."""
    packed = constants = 0
    dense = shape.dense * WIDTH[dtype]
    for layer in shape.linears:
        if not (quantized and layer.quantized):
            dense += layer.weights * WIDTH[dtype]
            continue
        packed += -(-layer.weights // 2)
        blocks = -(-layer.weights // BLOCK)
        nested = blocks + 4 * -(-blocks // NESTED_BLOCK) + _NESTED_TABLE
        constants += _TABLE + (nested if double_quant else 4 * blocks)
    return BaseBytes(packed, constants, dense)


def target_layers(shape: Shape, targets: str | tuple[str, ...]) -> tuple[Linear, ...]:
    """The layers that `lora.target_modules` names.

    Raises:
        ModelError: a name matches no layer.
    """
    if targets == "all-linear":
        return shape.linears
    for target in targets:
        if not any(_matches(layer.name, target) for layer in shape.linears):
            known = ", ".join(sorted({layer.name.rpartition(".")[2] for layer in shape.linears}))
            raise ModelError(
                f"lora.target_modules: the model has no layer {target!r}; it has {known}"
            )
    return tuple(layer for layer in shape.linears if any(_matches(layer.name, t) for t in targets))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def adapter_parameters(layers: tuple[Linear, ...], rank: int) -> int:
    """Weights of one adapter: A is (rank, inputs), B is (outputs, rank)."""
    return sum(rank * (layer.inputs + layer.outputs) for layer in layers)


def adapter_bytes(parameters: int, dtype: str) -> int:
    """The float32 master and, where the products run in another dtype, the working copy."""
    return parameters * (4 if dtype == "float32" else 4 + WIDTH[dtype])


def optimizer_bytes(parameters: int, name: str, machine: Machine) -> int:
    """The optimizer's state; `auto` is AdamW in float32, paged on CUDA."""
    if name.startswith("paged") and not machine.cuda:
        raise RefusedError(
            f"training.optimizer: {name} needs a CUDA device; on this machine take adamw or auto"
        )
    return int(parameters * (_MOMENTS_8BIT if name == "paged_adamw_8bit" else _MOMENTS))
