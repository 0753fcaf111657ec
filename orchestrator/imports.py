"""Imports that would bring more than is used of them."""

import sys
from typing import Any


def import_bitsandbytes() -> Any:
    """The package, imported without torch's compiler where nobody has imported it yet.

    bitsandbytes (0.50) has four functions compiled while it is imported, for devices without
    kernels of their own. CPUs and CUDA have such kernels, so that none of the four is ever called;
    the compiler took 3 of the 7 seconds of the import and 40 MiB. The four stay as written.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    import torch

    compiler: Any = torch.compile
    torch.compile = _as_written  # type: ignore[assignment]
    try:
        import bitsandbytes
    finally:
        torch.compile = compiler
    return bitsandbytes


def _as_written(function: Any = None, **options: Any) -> Any:
    """In the place of `torch.compile`; with options alone it is a decorator."""
    return _same if function is None else function


def _same(function: Any) -> Any:
    return function
