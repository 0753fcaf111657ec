"""Counts the bytes of tensors that live at a time, in a run on the meta device.

Every operation of a real forward and backward pass is dispatched, none is computed: what
autograd keeps, what a function allocates for a moment and when it is freed are the model's own.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestrator.plan.results import result

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Ledger(TorchDispatchMode):
    """While it is entered, adds up the storages that are made and freed.

    Attributes:
        live: bytes that are held now.
        peak: the most that was held at a time.
        peak_note: the note under which that was.
        events: each block made and freed, as (key, bytes) and (key, -bytes).
        products: the matrix products, each shape once: the operation, its operands' shapes and
            strides.
    """

    def __init__(self, known: Iterable[Tensor], round_up: int = 64) -> None:
        """A ledger at zero.

        Args:
            known: tensors that were there before, which do not count.
            round_up: bytes that the device's allocator hands out are multiples of this.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.peak_note = ""
        self.events: list[tuple[int, int]] = []
        self.products: set[tuple[Any, tuple[Any, ...]]] = set()
        self._round_up, self._note = round_up, ""
        self._held: dict[int, Any] = {t.untyped_storage()._cdata: None for t in known}

    @contextmanager
    def note(self, text: str) -> Iterator[None]:
        """Names what happens inside, for `peak_note`."""
        before, self._note = self._note, text
        try:
            yield
        finally:
            self._note = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count the storages it made."""
        found = result(func, args, kwargs or {})
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._count(leaf)
        if func.overloadpacket.__name__ in _PRODUCTS:
            shapes = tuple((t.shape, t.stride()) for t in args if isinstance(t, Tensor))
            self.products.add((func, shapes))
        return found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = -(-storage.nbytes() // self._round_up) * self._round_up
        self._held[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.live += size
        self.events.append((key, size))
        if self.live > self.peak:
            self.peak, self.peak_note = self.live, self._note

    def _free(self, key: int, size: int) -> None:
        del self._held[key]
        self.live -= size
        self.events.append((key, -size))
