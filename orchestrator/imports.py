"""How large libraries are imported: they take most of a command's first seconds."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from threading import Lock, RLock, Thread
from typing import Any

_importing = Lock()
_uncollected = RLock()


@contextmanager
def uncollected() -> Iterator[None]:
    """Around imports: they leave no garbage, and looking for it takes a seventh of their time."""
    with _uncollected:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()


def import_beside(libraries: Sequence[str]) -> Thread:
    """Import in a thread, while this one waits for other processes.

    Of a library that cannot be imported hears who needs it.
    """

    def work() -> None:
        with uncollected(), suppress(Exception):
            for name in libraries:
                import_module(name)

    thread = Thread(target=work, daemon=True)
    thread.start()
    return thread


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
