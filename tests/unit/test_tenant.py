"""A tenant's optimizer: what it keeps across a kill, and float16's loss scale."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.config import TrainingConfig
from orchestrator.training import optimizers
from orchestrator.training.tenant import Tenant

CONFIG = TrainingConfig(max_steps=9, learning_rate=0.1, max_grad_norm=1.0)
# bitsandbytes quantizes the state of more than 4,096 weights only.
SIZE = 8192


def _adapter(working: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    master = nn.Parameter(torch.randn(SIZE))
    return SimpleNamespace(
        master=master,
        gradient=torch.zeros(SIZE),
        working=torch.zeros(SIZE, dtype=working),
        publish=lambda: None,
    )


def _take_steps(tenant: Tenant, first: int, last: int) -> None:
    for step in range(first, last + 1):
        torch.manual_seed(step)
        tenant.adapter.gradient.copy_(torch.randn(SIZE))
        tenant.update(step)


@pytest.mark.parametrize("name", ["adamw", "paged_adamw", "paged_adamw_8bit"])
def test_an_optimizer_goes_on_where_it_was_saved(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without CUDA bitsandbytes' optimizers are the same, but for the paging.
    monkeypatch.setattr(optimizers, "resolve", lambda *_: name)
    whole, before = Tenant(_adapter(), CONFIG, 9), Tenant(_adapter(), CONFIG, 9)
    _take_steps(whole, 1, 6)
    _take_steps(before, 1, 3)
    after = Tenant(_adapter(), CONFIG, 9)
    with torch.no_grad():
        after.adapter.master.copy_(before.adapter.master)
    tensors = before.optimizer_tensors()
    assert sum(tensor.numel() == SIZE for tensor in tensors.values()) == 2
    after.restore(tensors, before.numbers())
    _take_steps(after, 4, 6)
    assert torch.equal(after.adapter.master, whole.adapter.master)


def test_float16_takes_the_steps_of_float32() -> None:
    """Gradients come scaled by what the tenant's scaler says, before its first step too."""
    scaled, plain = Tenant(_adapter(torch.float16), CONFIG, 9), Tenant(_adapter(), CONFIG, 9)
    for step in range(1, 5):
        gradient = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        scaled.adapter.gradient.copy_(gradient * scaled.scaler.get_scale())
        plain.adapter.gradient.copy_(gradient)
        left, right = scaled.update(step), plain.update(step)
        assert left.applied and left.gradient_norm == pytest.approx(right.gradient_norm, rel=1e-5)
    torch.testing.assert_close(scaled.adapter.master, plain.adapter.master)


def test_float16_leaves_out_a_step_that_overflowed_and_lowers_its_scale() -> None:
    tenant = Tenant(_adapter(torch.float16), CONFIG, 9)
    before, scale = tenant.adapter.master.detach().clone(), tenant.scaler.get_scale()
    tenant.adapter.gradient.fill_(torch.inf)
    assert not tenant.update(1).applied
    assert torch.equal(tenant.adapter.master, before)
    assert tenant.scaler.get_scale() == scale / 2
    resumed = Tenant(_adapter(torch.float16), CONFIG, 9)
    resumed.restore({}, tenant.numbers())
    assert resumed.scaler.get_scale() == scale / 2
