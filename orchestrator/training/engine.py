"""The step: k adapters, one frozen base, rows of tokens.

A step's examples are dealt to the workers by tokens, each worker lays its own out in rows, each
row is one forward and backward pass. The losses are normalised by each tenant's own targets over
all workers, so neither the deal nor the cut shows in the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.data.batches import deal
from orchestrator.model.adapters import Adapter, AdapterSet
from orchestrator.model.base import Base
from orchestrator.model.loss import token_losses
from orchestrator.model.packed import hidden_states
from orchestrator.training.collective import World
from orchestrator.training.rows import Row, Segment, arrange, build
from orchestrator.training.tenant import Tenant, Update


@dataclass(frozen=True)
class StepResult:
    """One tenant's step. `update` is None where the loss was not finite: nothing was changed."""

    loss: float
    tokens: int
    target_tokens: int
    update: Update | None


@dataclass(frozen=True)
class Engine:
    """What every pass needs. `tokens_per_pass` bounds a row; `world` sums over the workers."""

    base: Base
    adapters: AdapterSet
    world: World
    tokens_per_pass: int

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
        """
        targets = [_target_count(batch) for batch in batches]
        scales = [tenant.scaler.get_scale() for tenant in tenants]
        factors = torch.tensor(
            [scale / max(1, count) for scale, count in zip(scales, targets, strict=True)],
            device=self.base.device,
        )
        sums = torch.zeros(len(tenants), dtype=torch.float64, device=self.base.device)
        holders = [tenant.adapter for tenant in tenants]
        for row in self._rows([segment for batch in batches for segment in batch]):
            sums += self._train_row(row, holders, factors)
        self.world.sum([*(holder.gradient for holder in holders), sums])
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
        """Sum of the losses at the targets of `segments` (of tenant 0), and their number."""
        total = torch.zeros(1, dtype=torch.float64, device=self.base.device)
        for row in self._rows(segments):
            with self.adapters.active([(adapter, 0, -1)]):
                hidden = hidden_states(self.base, row.tokens, row.lengths)
            ones = torch.ones(len(row.targets), device=hidden.device)
            picked = hidden.index_select(0, row.positions)
            total += token_losses(picked, self.base.head, row.targets, ones)[1].double().sum()
        self.world.sum([total])
        return total.item(), _target_count(segments)

    def _rows(self, segments: Sequence[Segment]) -> list[Row]:
        """This worker's share of the segments, by tokens, in rows."""
        lengths = [len(segment.example.ids) for segment in segments]
        mine = [segments[place] for place in deal(lengths, self.world.size)[self.world.rank]]
        return [build(row).to(self.base.device) for row in arrange(mine, self.tokens_per_pass)]

    def _train_row(self, row: Row, holders: Sequence[Adapter], factors: Tensor) -> Tensor:
        """Forward and backward of one row; returns each tenant's sum of losses, float64 (k,)."""
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
