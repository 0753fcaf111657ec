"""The step: k adapters, one frozen base, rows of tokens.

A step's examples are dealt to the workers by tokens, each worker lays its own out in rows, each
row is one forward and backward pass. The losses are normalised by each tenant's own targets over
all workers, so neither the deal nor the cut shows in the result. So where memory runs out in a
pass, the rows are made shorter and passed again from the step's start.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.data.batches import deal
from orchestrator.errors import TrainingError
from orchestrator.lengths import row_length
from orchestrator.model.adapters import Adapter, AdapterSet
from orchestrator.model.base import Base
from orchestrator.model.compiled import compile_loss
from orchestrator.model.loss import token_losses
from orchestrator.model.packed import hidden_states
from orchestrator.training import memory
from orchestrator.training.collective import World
from orchestrator.training.rows import Row, Segment, arrange, build
from orchestrator.training.tenant import Tenant, Update

_NOTHING_SHORTER = (
    "Out of memory in passes no longer than the longest example, which has {} tokens. Set "
    "training.gradient_checkpointing to true, lora.rank or data.max_length lower, or take a "
    "device with more memory; `orchestrator plan` says what fits"
)


@dataclass(frozen=True)
class StepResult:
    """One tenant's step. `update` is None where the loss was not finite: nothing was changed."""

    loss: float
    tokens: int
    target_tokens: int
    update: Update | None


def _not_told(before: int, after: int) -> None:
    return


@dataclass
class Engine:
    """What every pass needs; only `tokens_per_pass` changes, and only downwards.

    world: sums over the workers. tokens_per_pass: bounds a row. shortened: is told the budget
    before and after memory ran out.
    """

    base: Base
    adapters: AdapterSet
    world: World
    tokens_per_pass: int
    shortened: Callable[[int, int], None] = _not_told

    def step(
        self,
        tenants: Sequence[Tenant],
        batches: Sequence[list[Segment]],
        steps: Sequence[int],
    ) -> list[StepResult]:
        """Train each tenant on its own batch and take its optimizer step.

        Args:
            tenants: who trains.
            batches: each tenant's segments, whose `tenant` is its place in `tenants`.
            steps: number of each tenant's optimizer step, from 1.

        Raises:
            TrainingError: memory ran out in passes no longer than the longest example.
        """
        targets = [_target_count(batch) for batch in batches]
        scales = [tenant.scaler.get_scale() for tenant in tenants]
        factors = torch.tensor(
            [scale / max(1, count) for scale, count in zip(scales, targets, strict=True)],
            device=self.base.device,
        )
        sums = torch.zeros(len(tenants), dtype=torch.float64, device=self.base.device)
        holders = [tenant.adapter for tenant in tenants]

        def train(row: Row) -> None:
            sums.add_(self._train_row(row, holders, factors))

        def forget() -> None:
            sums.zero_()
            for tenant in tenants:
                tenant.discard()

        everything = [segment for batch in batches for segment in batch]
        totals = [*(holder.gradient for holder in holders), sums]
        self._pass_and_sum(everything, train, forget, totals)
        results = []
        for tenant, batch, step, count, total in zip(
            tenants, batches, steps, targets, sums.tolist(), strict=True
        ):
            loss = total / max(1, count)
            update = tenant.update(step) if math.isfinite(loss) else None
            if update is None:
                tenant.discard()
            results.append(StepResult(loss, sum(len(s.example.ids) for s in batch), count, update))
        return results

    @torch.no_grad()
    def evaluate(self, adapter: Adapter, segments: Sequence[Segment]) -> tuple[float, int]:
        """Sum of the losses at the targets of `segments` (of tenant 0), and their number.

        Raises:
            TrainingError: memory ran out in passes no longer than the longest example.
        """
        total = torch.zeros(1, dtype=torch.float64, device=self.base.device)

        def measure(row: Row) -> None:
            with self.adapters.active([(adapter, 0, -1)]):
                hidden = hidden_states(self.base, row.tokens, row.lengths)
            ones = torch.ones(len(row.targets), device=hidden.device)
            picked = hidden.index_select(0, row.positions)
            losses = token_losses(picked, self.base.head, row.targets, ones)[1]
            total.add_(losses.double().sum())

        self._pass_and_sum(segments, measure, lambda: total.zero_(), [total])
        return total.item(), _target_count(segments)

    def _pass_and_sum(
        self,
        segments: Sequence[Segment],
        work: Callable[[Row], None],
        forget: Callable[[], Any],
        totals: Sequence[Tensor],
    ) -> None:
        """Pass this worker's share of the segments, row by row, and sum `totals` over all workers.

        Where memory runs out on any worker, all `forget` what they have done and begin again with
        shorter rows. The word of it travels with the sum, in which the others wait already.
        """
        lengths = [len(segment.example.ids) for segment in segments]
        hands = [[segments[n] for n in hand] for hand in deal(lengths, self.world.size)]
        while True:
            rows = self._rows(hands[self.world.rank])
            ran_out = self._runs_out(rows, work)
            if ran_out:
                # The sum needs room too.
                memory.release_cached(self.base.device)
            short = torch.tensor([float(ran_out)], device=self.base.device)
            self.world.sum([*totals, short])
            if not short.item():
                return
            forget()
            self._shorten(hands)

    def _rows(self, hand: Sequence[Segment]) -> list[list[Segment]]:
        return arrange(hand, self.tokens_per_pass, self.base.short)

    def _shorten(self, hands: Sequence[Sequence[Segment]]) -> None:
        """Take a smaller budget; every worker knows what all have, and comes to the same.

        Raises:
            TrainingError: no row is longer than the longest example.
        """
        rows = [row for hand in hands for row in self._rows(hand)]
        sizes = [[len(segment.example.ids) for segment in row] for row in rows]
        row, example = max(map(sum, sizes)), max(map(max, sizes))
        if row == example:
            raise TrainingError(_NOTHING_SHORTER.format(example))
        budget = max(row // 2, example)
        self.shortened(self.tokens_per_pass, budget)
        self.tokens_per_pass = budget

    def _runs_out(self, rows: Sequence[list[Segment]], work: Callable[[Row], None]) -> bool:
        """Pass rows; whether memory ran out in between."""
        try:
            for row in rows:
                work(self._build(row))
        except (MemoryError, RuntimeError) as error:
            if not memory.ran_out(error):
                raise
            return True
        return False

    def _build(self, segments: Sequence[Segment]) -> Row:
        device, length = self.base.device, 0
        if device.type == "cpu":
            tokens = sum(len(segment.example.ids) for segment in segments)
            length = row_length(tokens, self.tokens_per_pass)
        return build(segments, length).to(device)

    def _train_row(self, row: Row, holders: Sequence[Adapter], factors: Tensor) -> Tensor:
        """Forward and backward of one row; returns each tenant's sum of losses, float64 (k,)."""
        compile_loss(self.base.head, len(row.targets))
        spans = [(holders[tenant], start, stop) for tenant, start, stop in row.spans]
        with self.adapters.active(spans, row.dropout_keys):
            hidden = hidden_states(self.base, row.tokens, row.lengths)
            picked = hidden.index_select(0, row.positions)
            total, losses = token_losses(picked, self.base.head, row.targets, factors[row.owners])
            total.backward()
        sums = torch.zeros(len(holders), dtype=torch.float64, device=losses.device)
        return sums.index_add_(0, row.owners, losses.double())


def _target_count(segments: Sequence[Segment]) -> int:
    return sum(int(segment.example.trained[1:].sum()) for segment in segments)
