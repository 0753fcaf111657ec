"""What this machine's processor is good at."""


def has_bfloat16() -> bool:
    """Whether it multiplies bfloat16 numbers without converting them first."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def slow_bfloat16() -> bool:
    """Whether its float32 products are faster than its bfloat16 ones.

    Intel's processors multiply bfloat16 in AMX, and at half of float32's rate where a virtual
    machine hides AMX: a Xeon's core with AVX-512 bf16 did 82 GFLOP/s in bfloat16 and 162 in
    float32. AMD's are faster in bfloat16.
    """
    import torch

    capabilities = torch.cpu.get_capabilities()
    intel = str(capabilities.get("cpu_name", "")).startswith("Intel")
    return intel and not capabilities.get("amx_bf16", False)


def product_dtype(dtype: str, cuda: bool) -> str:
    """The dtype in which a base of `dtype` is multiplied; its activations are kept in `dtype`.

    Float32 products of bfloat16 numbers are the same products, only rounded less.
    """
    return "float32" if dtype == "bfloat16" and not cuda and slow_bfloat16() else dtype
