"""The device a process trains on and the dtype it computes in."""

import torch

from orchestrator.errors import RefusedError
from orchestrator.processor import has_bfloat16

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def training_device() -> torch.device:
    """The first GPU, or the CPU where torch sees no CUDA device."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products; `auto` takes bfloat16 where the device has it.

    Raises:
        RefusedError: float16 on a CPU, which has no use for it.
    """
    if name == "auto":
        if _has_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if name == "float16" and device.type == "cpu":
        raise RefusedError(
            "quantization.compute_dtype: float16 needs a GPU; take bfloat16, float32 or auto"
        )
    return _DTYPES[name]


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return has_bfloat16()
