"""Rows on a CPU have few lengths, and what fills them up changes nothing."""

from pathlib import Path

import pytest
import torch

from orchestrator.config import LoraConfig, TrainingConfig
from orchestrator.model.attention import LENGTH_STEP, widened
from orchestrator.training import engine as engines
from orchestrator.training.rows import LENGTHS, Segment, build, padded_length
from tests import tiny


@pytest.mark.parametrize("budget", [1, 7, 64, 1000, 4096])
def test_rows_of_a_budget_have_few_lengths(budget: int) -> None:
    lengths = {tokens: padded_length(tokens, budget) for tokens in range(1, budget + 1)}
    assert all(tokens <= length <= budget for tokens, length in lengths.items())
    assert all(length - tokens < max(1, budget / LENGTHS) for tokens, length in lengths.items())
    assert len(set(lengths.values())) <= LENGTHS + 1


def test_an_example_that_is_longer_than_the_budget_stays_as_it_is() -> None:
    assert padded_length(100, 64) == 100


def test_short_segments_have_few_lengths() -> None:
    lengths = {widened(length) for length in range(1, 513)}
    assert lengths == set(range(LENGTH_STEP, 513, LENGTH_STEP))


def test_a_row_is_filled_up_with_a_segment_of_no_ones_targets() -> None:
    segments = [Segment(0, 5, example) for example in tiny.examples([5, 9])]
    plain, filled = build(segments), build(segments, 20)
    assert filled.lengths == (5, 9, 6) and filled.spans == ((0, 0, 20),)
    assert torch.equal(filled.tokens[:14], plain.tokens) and not filled.tokens[14:].any()
    assert torch.equal(filled.positions, plain.positions)
    # Every token has a mask of dropout, or there would be whatever lay in memory.
    assert [(start, stop) for start, stop, _ in filled.dropout_keys] == [(0, 5), (5, 14), (14, 20)]


def _train(folder: Path, dropout: float, budget: int) -> tuple[list[float], torch.Tensor]:
    base = tiny.load_base(folder)
    lora, training = LoraConfig(rank=4, dropout=dropout), TrainingConfig(learning_rate=1e-2)
    batches = [[tiny.examples([17, 30, 9], seed) for seed in range(4)]] * 2
    history, tenants = tiny.train(base, [(lora, training)] * 2, batches, budget)
    return [result.loss for results in history for result in results], tenants[0].adapter.master


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_fills_a_row_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    folder = tiny.save_model(tmp_path / "model")
    losses, weights = _train(folder, dropout, budget=333)
    monkeypatch.setattr(engines, "padded_length", lambda tokens, budget: tokens)
    bare, bare_weights = _train(folder, dropout, budget=333)
    assert losses == pytest.approx(bare, rel=1e-5)
    assert torch.allclose(weights, bare_weights, atol=1e-5)
