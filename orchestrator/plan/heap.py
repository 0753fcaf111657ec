"""How much address space the C library's heap takes for a sequence of blocks.

On a CPU torch asks glibc for blocks aligned to 64 bytes. glibc (2.36, malloc.c, _int_memalign)
searches for 96 bytes more than it then keeps. So a block that was freed alone never serves a
request of its own size again; neighbours freed together do, where nothing keeps them apart
(allocator.py). Blocks from the mapping threshold on are pages of their own and cost what they hold.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

# Set by training/memory.py. On two cores with AVX-512 bf16 a step of SmolLM2-135M took a tenth
# longer with 4 MiB, for the kernel zeroes each block anew; with 1 GiB it was no faster than with
# 32 MiB and held up to 5% more, in holes that large blocks leave.
MAPPED_BYTES = 32 * 2**20
_PAGE, _SLACK = 4096, 96

# A block is made (key, bytes) or freed (key, -bytes).
Event = tuple[int, int]


class Heap:
    """Best fit with freed neighbours joined at once."""

    def __init__(self) -> None:
        self.top = self.mapped = self.peak = 0
        self._holes: list[tuple[int, int]] = []  # (size, start), smallest first
        self._by_start: dict[int, int] = {}
        self._by_end: dict[int, int] = {}
        self._blocks: dict[object, tuple[int, int]] = {}

    def take(self, key: object, size: int) -> None:
        """Hand out a block."""
        if size >= MAPPED_BYTES:
            whole = -(-size // _PAGE) * _PAGE + _PAGE
            self.mapped += whole
            self._blocks[key] = (-1, whole)
        else:
            self._blocks[key] = (self._place(size + _SLACK), size + _SLACK)
        self.peak = max(self.peak, self.top + self.mapped)

    def free(self, key: object) -> None:
        """Take a block back."""
        start, size = self._blocks.pop(key)
        if start < 0:
            self.mapped -= size
            return
        if start in self._by_end:
            before = self._by_end[start]
            self._unlist(before, start - before)
            start, size = before, start - before + size
        if start + size in self._by_start:
            after = self._by_start[start + size]
            self._unlist(start + size, after)
            size += after
        # The heap is not trimmed: what it had it keeps (M_TRIM_THRESHOLD).
        self._list(start, size)

    def _place(self, size: int) -> int:
        found = bisect_left(self._holes, (size + _SLACK, -1))
        if found == len(self._holes):
            start = self.top
            if start in self._by_end:
                # The last hole reaches the top and grows.
                start = self._by_end[start]
                self._unlist(start, self.top - start)
            self.top = start + size
            return start
        hole, start = self._holes[found]
        self._unlist(start, hole)
        if hole > size:
            self._list(start + size, hole - size)
        return start

    def _list(self, start: int, size: int) -> None:
        insort(self._holes, (size, start))
        self._by_start[start] = size
        self._by_end[start + size] = start

    def _unlist(self, start: int, size: int) -> None:
        del self._holes[bisect_left(self._holes, (size, start))]
        del self._by_start[start], self._by_end[start + size]


def heap_bytes(events: list[Event], standing: Iterable[int]) -> int:
    """Most bytes of three equal passes, beyond `standing`.

    Args:
        events: one pass's blocks, in order.
        standing: blocks of the optimizer's state, made after the first pass.
    """
    heap, stay = Heap(), list(standing)
    for number in range(3):
        _replay(heap, events)
        if number == 0:
            for place, size in enumerate(stay):
                heap.take(("standing", place), size)
    return heap.peak - sum(stay)


def _replay(heap: Heap, events: list[Event]) -> None:
    held: set[int] = set()
    for key, size in events:
        if size > 0:
            heap.take(key, size)
            held.add(key)
        elif key in held:
            heap.free(key)
            held.remove(key)
    for key in held:
        heap.free(key)
