"""A row of a new length passes the first layer twice, and nothing comes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import LoraConfig, TrainingConfig
from orchestrator.model import compiled
from orchestrator.model.adapters import AdapterSet
from orchestrator.model.base import Base
from orchestrator.model.loss import Head
from orchestrator.model.packed import hidden_states
from orchestrator.training import budget
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path)


def _base(folder: Path, monkeypatch: pytest.MonkeyPatch, compiles: bool) -> tuple[Base, AdapterSet]:
    # A float32 base, on which two runs are compared to the last bit.
    monkeypatch.setattr(compiled, "compiles", lambda _: compiles)
    base = tiny.load_base(folder)
    return base, AdapterSet(base.model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_stays_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    job = (LoraConfig(rank=4, dropout=0.2), TrainingConfig(learning_rate=5e-3))
    batches = [[tiny.examples([9 * step, 40, 7], step) for step in range(1, 5)]]
    found = []
    for compiles in (False, True):
        base, adapters = _base(folder, monkeypatch, compiles)
        budget.apply(budget.Budget(64, checkpointing), base.model)
        history, tenants = tiny.train(base, [job], batches, 64, adapters)
        found.append(([result.loss for result in history[0]], tenants[0].adapter.master))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_a_new_length_is_passed_twice_by_the_first_layer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = _base(folder, monkeypatch, compiles=True)
    adapter = adapters.add(LoraConfig(rank=4), 0)
    model: Any = base.decoder
    calls: list[int] = []
    for place, layer in enumerate(model.layers):
        monkeypatch.setattr(layer, "forward", _told(layer.forward, calls, place))

    def passes(*lengths: int) -> list[int]:
        calls.clear()
        with adapters.active([(adapter, 0, -1)]):
            hidden_states(base, torch.ones(sum(lengths), dtype=torch.long), lengths)
        return calls.copy()

    assert passes(40) == [0, 0, 1]
    assert passes(40) == [0, 1]
    # As long a row, of segments that are shorter.
    assert passes(20, 20) == [0, 0, 1]
    # A segment was as long, no row was.
    assert passes(32) == [0, 0, 1]
    # Of its segment's length there was one, of its rank none.
    adapters.remove(adapter)
    adapter = adapters.add(LoraConfig(rank=8), 0)
    assert passes(32) == [0, 0, 1]
    with torch.no_grad():
        assert passes(50) == [0, 1]
    assert not adapter.gradient.any()


def _told(forward: Any, calls: list[int], place: int) -> Any:
    def told(*args: Any, **kwargs: Any) -> Any:
        calls.append(place)
        return forward(*args, **kwargs)

    return told


def test_chunks_of_a_new_size_are_computed_before_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "compiles", True)
    monkeypatch.setattr(compiled, "_chunks", set())
    sizes: list[int] = []
    monkeypatch.setattr(compiled, "token_losses", lambda hidden, *_: sizes.append(len(hidden)))
    # Chunks of 128 tokens.
    head = Head(torch.ones(50, 8), logits_bytes=4 * 50 * 128)
    for targets in (30, 60, 100, 300, 256, 0):
        compiled.compile_loss(head, targets)
    assert sizes == [64, 128]


def test_a_chunk_is_computed_with_the_real_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Head, "compiles", True)
    monkeypatch.setattr(compiled, "_chunks", set())
    compiled.compile_loss(Head(torch.ones(50, 8)), 10)
    assert compiled._chunks == {((50, 8), 64, torch.get_num_threads())}


def test_layers_of_two_kinds_are_met_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(**{**tiny.COMMON, "num_hidden_layers": 4}, head_dim=16)
    base, _ = _base(tiny.save_model(tmp_path, config), monkeypatch, compiles=True)
    model: Any = base.decoder
    assert [len(layer._forward_pre_hooks) for layer in model.layers] == [1, 1, 0, 0]
