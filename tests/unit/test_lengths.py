"""A CPU fills rows, segments and chunks up to few lengths, and by little."""

import pytest

from orchestrator.lengths import (
    block_length,
    chunk_length,
    row_length,
    row_lengths,
    segment_length,
    slice_length,
)


@pytest.mark.parametrize("budget", [1, 7, 31, 64, 127, 1000, 1024, 4096, 65536])
def test_rows_of_a_budget_have_few_lengths(budget: int) -> None:
    lengths = {tokens: row_length(tokens, budget) for tokens in range(1, budget + 1)}
    assert all(tokens <= length <= budget for tokens, length in lengths.items())
    assert sorted(set(lengths.values())) == row_lengths(budget)
    assert len(row_lengths(budget)) <= (16 if budget <= 1024 else 64)


def test_a_row_is_filled_by_little_whatever_the_budget() -> None:
    for tokens in (1, 20, 63, 120, 500, 1023, 1025, 3000, 50000):
        assert row_length(tokens, 2**20) - tokens < max(64, tokens / 8)


def test_longer_examples_than_the_budget_have_few_lengths_too() -> None:
    lengths = {row_length(tokens, 1024) for tokens in range(1025, 2049)}
    assert lengths == set(range(1152, 2049, 128))


def test_segments_have_few_lengths() -> None:
    assert {segment_length(tokens) for tokens in range(1, 513)} == set(range(16, 513, 16))
    assert {segment_length(tokens) for tokens in range(513, 1025)} == set(range(576, 1025, 64))


@pytest.mark.parametrize(
    ("fit", "chunk"), [(4, 16), (40, 40), (110, 110), (130, 128), (512, 512), (600, 576)]
)
def test_a_chunk_of_the_loss_is_whole_steps(fit: int, chunk: int) -> None:
    assert chunk_length(300, True, logits_bytes=4 * 300 * fit) == chunk
    assert chunk_length(300, False, logits_bytes=4 * 300 * fit) == max(16, fit)


def test_a_chunk_of_any_vocabulary_holds_some_tokens() -> None:
    assert chunk_length(10**9, True) == 16
    assert block_length(10**9) == 8
    assert slice_length(32000, 10**9, 4) == 1
    assert slice_length(100, 64, 4) == 100
