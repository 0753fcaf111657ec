"""Memory that runs out in a pass: real refusals of the allocator, and the step's result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config import LoraConfig, TrainingConfig
from orchestrator.errors import TrainingError
from orchestrator.model.adapters import AdapterSet
from orchestrator.model.base import Base
from orchestrator.training import memory
from orchestrator.training.collective import World
from orchestrator.training.engine import Engine, StepResult
from orchestrator.training.rows import Segment
from orchestrator.training.tenant import Tenant
from tests import tiny

LENGTHS = (37, 5, 64, 12, 50, 8, 20, 41)
MORE_THAN_THERE_IS = 2**60


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return tiny.load_base(tiny.save_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def adapters(base: Base) -> AdapterSet:
    return AdapterSet(base.model)


class Run:
    """Two tenants on one engine, and the budgets it was told of."""

    def __init__(self, base: Base, adapters: AdapterSet, tokens: int) -> None:
        self.told: list[tuple[int, int]] = []
        training = TrainingConfig(learning_rate=5e-3)
        self.tenants = [
            Tenant(adapters.add(LoraConfig(rank=4, dropout=0.2), seed), training, 4)
            for seed in range(2)
        ]
        self.engine = Engine(
            base, adapters, World(), tokens, lambda *change: self.told.append(change)
        )

    def step(self, number: int) -> list[StepResult]:
        batches = [
            [Segment(place, number * 10 + n, e) for n, e in enumerate(tiny.examples(LENGTHS, seed))]
            for place, seed in ((0, number), (1, number + 50))
        ]
        return self.engine.step(self.tenants, batches, [number + 1] * 2)

    def close(self) -> None:
        for tenant in self.tenants:
            self.engine.adapters.remove(tenant.adapter)


@pytest.fixture
def start(base: Base, adapters: AdapterSet) -> Iterator[Callable[..., Run]]:
    runs = []

    def make(tokens: int) -> Run:
        runs.append(Run(base, adapters, tokens))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


@contextmanager
def refusals(base: Base, calls: set[int], backward: bool = False) -> Iterator[None]:
    """The allocator refuses in these passes of the last layer, in its backward pass on demand."""
    count = 0

    def refuse(*_: Any) -> None:
        torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)

    def hook(module: Any, inputs: Any, output: Any) -> None:
        nonlocal count
        count += 1
        if count in calls and backward:
            output.register_hook(refuse)
        elif count in calls:
            refuse()

    handle = base.decoder.layers[-1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("backward", [False, True])
def test_the_step_is_repeated_from_its_start_with_half_the_tokens(
    base: Base, start: Callable[..., Run], backward: bool
) -> None:
    undisturbed, disturbed = start(512), start(512)
    wanted = [undisturbed.step(number) for number in range(3)]
    found = [disturbed.step(0)]
    rows = 0

    def row(*_: Any) -> None:
        nonlocal rows
        rows += 1

    with refusals(base, {1}, backward):
        found.append(disturbed.step(1))
    handle = base.decoder.register_forward_pre_hook(row)
    found.append(disturbed.step(2))
    handle.remove()
    assert disturbed.told == [(512, 237)] and disturbed.engine.tokens_per_pass == 237
    assert rows == 3, "the smaller budget is kept"
    for one, other in zip(found, wanted, strict=True):
        for tenant in range(2):
            assert one[tenant].loss == pytest.approx(other[tenant].loss, rel=1e-5)
            assert one[tenant].tokens == other[tenant].tokens
            norms = [results[tenant].update.gradient_norm for results in (one, other)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_what_was_passed_before_counts_once(base: Base, start: Callable[..., Run]) -> None:
    undisturbed, disturbed = start(128), start(128)
    wanted = undisturbed.step(0)
    with refusals(base, {3}):
        found = disturbed.step(0)
    assert disturbed.told == [(128, 64)]
    for one, other in zip(found, wanted, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.update.gradient_norm == pytest.approx(other.update.gradient_norm, rel=1e-4)


def test_an_evaluation_is_repeated_too(base: Base, start: Callable[..., Run]) -> None:
    run = start(512)
    segments = [Segment(0, n, example) for n, example in enumerate(tiny.examples(LENGTHS))]
    adapter = run.tenants[0].adapter
    wanted = run.engine.evaluate(adapter, segments)
    with refusals(base, {1, 2}):
        found = run.engine.evaluate(adapter, segments)
    assert run.told == [(512, 118), (118, 64)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_one_example_that_does_not_fit_ends_the_run(base: Base, start: Callable[..., Run]) -> None:
    run = start(512)
    with (
        refusals(base, set(range(100))),
        pytest.raises(TrainingError, match=r"has 64 tokens.*gradient_checkpointing"),
    ):
        run.step(0)
    assert run.engine.tokens_per_pass == 64
    assert all(not tenant.adapter.gradient.any() for tenant in run.tenants)
    assert run.told[-1][1] == 64
    # With memory again there, it trains as if nothing had been.
    assert run.step(0)[0].loss == pytest.approx(start(512).step(0)[0].loss, rel=1e-5)


def test_other_errors_are_not_taken_for_it(base: Base, start: Callable[..., Run]) -> None:
    run = start(512)

    def fail(*_: Any) -> None:
        torch.ones(2) @ torch.ones(3)

    handle = base.decoder.layers[0].register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="inconsistent tensor size"):
            run.step(0)
    finally:
        handle.remove()
    assert run.told == []


def test_the_allocators_word_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)
    assert memory.ran_out(raised.value)
    assert memory.ran_out(torch.OutOfMemoryError("CUDA out of memory")) and memory.ran_out(
        MemoryError()
    )
    assert not memory.ran_out(RuntimeError("shape mismatch")) and not memory.ran_out(ValueError())
