"""Rows on a CPU have few lengths, and what fills them up changes nothing."""

from pathlib import Path

import pytest
import torch

from orchestrator.config import LoraConfig, TrainingConfig
from orchestrator.training import engine as engines
from orchestrator.training.rows import Segment, build
from tests import tiny


def test_a_row_is_filled_up_with_segments_of_no_ones_targets() -> None:
    segments = [Segment(0, 5, example) for example in tiny.examples([5, 9])]
    plain, filled = build(segments), build(segments, 25)
    # None is longer than the longest example.
    assert filled.lengths == (5, 9, 9, 2) and filled.spans == ((0, 0, 25),)
    assert torch.equal(filled.tokens[:14], plain.tokens) and not filled.tokens[14:].any()
    assert torch.equal(filled.positions, plain.positions)
    # Every token has a mask of dropout, or there would be whatever lay in memory.
    masked = [(start, stop) for start, stop, _ in filled.dropout_keys]
    assert masked == [(0, 5), (5, 14), (14, 23), (23, 25)]


def _train(folder: Path, dropout: float, budget: int) -> tuple[list[float], torch.Tensor]:
    base = tiny.load_base(folder)
    lora, training = LoraConfig(rank=4, dropout=dropout), TrainingConfig(learning_rate=1e-2)
    batches = [[tiny.examples([5, 4, 3], seed) for seed in range(4)]] * 2
    history, tenants = tiny.train(base, [(lora, training)] * 2, batches, budget)
    return [result.loss for results in history for result in results], tenants[0].adapter.master


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_fills_a_row_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    folder = tiny.save_model(tmp_path / "model")
    losses, weights = _train(folder, dropout, budget=333)
    monkeypatch.setattr(engines, "row_length", lambda tokens, budget: tokens)
    bare, bare_weights = _train(folder, dropout, budget=333)
    assert losses == pytest.approx(bare, rel=1e-5)
    assert torch.allclose(weights, bare_weights, atol=1e-5)
