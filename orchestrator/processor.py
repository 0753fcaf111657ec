"""What this machine's processor is good at."""

import os


def cores() -> int:
    """How many it has."""
    return os.cpu_count() or 1


def has_bfloat16() -> bool:
    """Whether it multiplies bfloat16 numbers without converting them first."""
    import torch

    return bool(torch.cpu.get_capabilities().get("avx512_bf16")) or has_amx()


def slow_bfloat16() -> bool:
    """Whether its float32 products are faster than its bfloat16 ones.

    Those without bfloat16 convert each number: an EPYC's core with AVX2 did 9 GFLOP/s in bfloat16
    and 57 in float32. Intel's multiply it in AMX, and at half of float32's rate where a virtual
    machine hides AMX: a Xeon's core with AVX-512 bf16 did 82 GFLOP/s in bfloat16 and 162 in
    float32. AMD's that have it are faster in it.
    """
    import torch

    if not has_bfloat16():
        return True
    intel = str(torch.cpu.get_capabilities().get("cpu_name", "")).startswith("Intel")
    return intel and not has_amx()


def has_amx() -> bool:
    """Whether it multiplies bfloat16 matrices in tiles."""
    import torch

    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def product_dtype(dtype: str, cuda: bool) -> str:
    """The dtype in which a base of `dtype` is multiplied; its activations are kept in `dtype`.

    Float32 products of bfloat16 numbers are the same products, only rounded less.
    """
    return "float32" if dtype == "bfloat16" and not cuda and slow_bfloat16() else dtype
