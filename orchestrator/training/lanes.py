"""Work of several adapters side by side in one process: each in a thread with its part of a CPU.

A product that two threads share ends when the slower of them does, and of two threads one is always
being interrupted where other processes run, such as Ray's. Threads that each have a pass of their
own wait for one another once a step. On two cores beside an idle Ray two adapters were 13% faster
than in one fused pass.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, TypeVar

import torch

from orchestrator.training.engine import Engine

Result = TypeVar("Result")


class Lanes:
    """The threads, and what of the engine's memory each of them may take.

    Made and used by the thread that trains otherwise.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Workers sum their gradients in an order that all keep; threads would not keep it.
        alone = engine.base.device.type == "cpu" and engine.world.size == 1
        self._threads = torch.get_num_threads()
        self._allowed = alone and not _changes_itself(engine.base.model)
        self._pool: ThreadPoolExecutor | None = None
        self._count = 0

    def hold(self, works: int, longest: int) -> bool:
        """Whether so many works can go on side by side.

        Args:
            works: how many there are; where there are more than threads, some wait.
            longest: tokens of the longest example in any of them, of which none is cut.
        """
        count = self._lanes(works)
        return self._allowed and count > 1 and longest <= self._engine.tokens_per_pass // count

    def run(self, works: Sequence[Callable[[Engine], Result]]) -> list[Future[Result]]:
        """Do all works, each with an engine whose passes hold no more than its lane's part.

        Returns:
            What came of each, all done; an error of one is raised by its `result`.
        """
        count = self._lanes(len(works))
        engines = [self._part(count) for _ in works]
        pool = self._pool_of(count)
        found = [pool.submit(work, part) for work, part in zip(works, engines, strict=True)]
        wait(found)
        self._take_over(min(part.tokens_per_pass for part in engines), count)
        return found

    def forbid(self) -> None:
        """Let nothing go on side by side any more: there is not the memory for it."""
        self._allowed = False

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            # What the lanes have set holds for threads to come as well.
            torch.set_num_threads(self._threads)
        self._pool, self._count = None, 0

    def _lanes(self, works: int) -> int:
        return min(works, self._threads)

    def _part(self, count: int) -> Engine:
        engine, head = self._engine, self._engine.base.head
        less = replace(head, logits_bytes=head.logits_bytes // count)
        return replace(
            engine,
            base=replace(engine.base, head=less),
            tokens_per_pass=engine.tokens_per_pass // count,
            shortened=lambda before, after: engine.shortened(before * count, after * count),
        )

    def _take_over(self, tokens: int, count: int) -> None:
        """Where memory ran out in a lane, the engine's own passes become shorter too."""
        if tokens < self._engine.tokens_per_pass // count:
            self._engine.tokens_per_pass = tokens * count

    def _pool_of(self, count: int) -> ThreadPoolExecutor:
        if self._pool is None or count != self._count:
            self.close()
            each = max(1, self._threads // count)
            self._pool = ThreadPoolExecutor(count, "lane", torch.set_num_threads, (each,))
            self._count = count
        return self._pool


def _changes_itself(model: Any) -> bool:
    """Whether its rotary embedding keeps numbers of the row that it passes."""
    kinds = {getattr(module, "rope_type", None) for module in model.modules()}
    return bool(kinds & {"dynamic", "longrope"})
