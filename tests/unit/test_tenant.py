"""A tenant's optimizer: what it keeps across a kill, and float16's loss scale."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.config import TrainingConfig
from orchestrator.errors import RefusedError
from orchestrator.training import memory, optimizers
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


@pytest.mark.parametrize(("first", "then"), [("adamw", "paged_adamw"), ("paged_adamw", "adamw")])
def test_a_run_of_auto_goes_on_on_another_kind_of_device(
    first: str, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "resolve", lambda *_: first)
    whole, before = Tenant(_adapter(), CONFIG, 9), Tenant(_adapter(), CONFIG, 9)
    _take_steps(whole, 1, 6)
    _take_steps(before, 1, 3)
    monkeypatch.setattr(optimizers, "resolve", lambda *_: then)
    after = Tenant(_adapter(), CONFIG, 9)
    with torch.no_grad():
        after.adapter.master.copy_(before.adapter.master)
    after.restore(before.optimizer_tensors(), before.numbers())
    _take_steps(after, 4, 6)
    torch.testing.assert_close(after.adapter.master, whole.adapter.master)


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """bitsandbytes pages as on CUDA, in ordinary memory; the addresses that were freed."""
    from bitsandbytes import functional
    from bitsandbytes.cextension import lib
    from bitsandbytes.optim.optimizer import Optimizer8bit

    def buffer(optimizer: Any, parameter: torch.Tensor, dtype: torch.dtype) -> Any:
        made: Any = torch.zeros_like(parameter, dtype=dtype)
        made.is_paged = True
        optimizer.page_mng.paged_tensors.append(made)
        return made

    addresses: list[Any] = []
    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", buffer)
    monkeypatch.setattr(functional, "prefetch_tensor", lambda _: None)
    monkeypatch.setattr(lib, "cudaFree", lambda at: addresses.append(at.value), raising=False)
    return addresses


@pytest.mark.parametrize(("name", "size"), [("paged_adamw", 4), ("paged_adamw_8bit", 1)])
def test_a_paged_state_is_paged_again_after_a_kill_and_freed_with_its_adapter(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch, freed: list[int]
) -> None:
    monkeypatch.setattr(optimizers, "resolve", lambda *_: name)
    whole, tenant = Tenant(_adapter(), CONFIG, 9), Tenant(_adapter(), CONFIG, 9)
    _take_steps(whole, 1, 4)
    _take_steps(tenant, 1, 2)
    master, optimizer = tenant.adapter.master, tenant.optimizer
    for _ in range(2):
        before = [optimizer.state[master][part] for part in ("state1", "state2")]
        tenant.restore(tenant.optimizer_tensors(), tenant.numbers())
        after = [optimizer.state[master][part] for part in ("state1", "state2")]
        for old, new in zip(before, after, strict=True):
            assert new.is_paged and torch.equal(old, new)
        assert freed[-2:] == [old.data_ptr() for old in before]
        assert memory._paged_bytes() == 2 * 2 * SIZE * size
    _take_steps(tenant, 3, 4)
    assert torch.equal(master, whole.adapter.master)
    del whole, tenant
    assert memory._paged_bytes() == 0 and len(freed) == 8


def test_more_weights_than_a_paged_optimizer_can_count_take_another() -> None:
    cuda = torch.device("cuda")
    assert optimizers.resolve("auto", cuda, 2**31 - 1) == "paged_adamw"
    assert optimizers.resolve("auto", cuda, 2**31) == "adamw"
    assert optimizers.resolve("adamw", cuda, 2**31) == "adamw"
    for name in ("paged_adamw", "paged_adamw_8bit"):
        assert optimizers.resolve(name, cuda, 2**31 - 1) == name
        with pytest.raises(RefusedError, match=f"{name} takes at most 2147483647 parameters"):
            optimizers.resolve(name, cuda, 2**31)


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


def test_a_gradient_that_is_never_finite_is_found_out() -> None:
    """In float16 it may be its scale, until there is none; else it is at once."""

    def overflows(tenant: Tenant) -> bool:
        tenant.adapter.gradient.fill_(torch.nan)
        return tenant.diverged(tenant.update(1))

    assert overflows(Tenant(_adapter(), CONFIG, 9))
    tenant = Tenant(_adapter(torch.float16), CONFIG, 9)
    halvings = int(math.log2(tenant.scaler.get_scale()))
    assert [overflows(tenant) for _ in range(halvings + 1)] == [False] * halvings + [True]
    tenant.adapter.gradient.fill_(1.0)
    assert not tenant.diverged(tenant.update(2))
