"""Imports that would bring more than is used of them."""

from threading import Lock
from typing import Any

_importing = Lock()


def import_bitsandbytes() -> Any:
    """The package, imported without torch's compiler where nobody has imported it yet.

    bitsandbytes (0.50) has four functions compiled while it is imported, for devices without
    kernels of their own. CPUs and CUDA have such kernels for all but odd shapes, while the compiler
    took 3 of the 7 seconds of the import and 40 MiB. The four stay as they are written.
    """
    import torch

    with _importing:
        compiler: Any = torch.compile
        torch.compile = _as_written
        try:
            import bitsandbytes
        finally:
            torch.compile = compiler
        return bitsandbytes


def _as_written(model: Any = None, **options: Any) -> Any:
    """In the place of `torch.compile`; with options alone it is a decorator."""
    return _same if model is None else model


def _same(function: Any) -> Any:
    return function
