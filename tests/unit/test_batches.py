"""Steps, rows and hands: arithmetic that every worker repeats alike."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import TrainingConfig
from orchestrator.data.batches import deal, pack, step_indices, steps_per_epoch, total_steps
from orchestrator.training.schedule import learning_rate

LENGTHS = st.lists(st.integers(1, 50), max_size=60)


@given(LENGTHS, st.integers(1, 80))
def test_rows_hold_each_example_once_within_the_budget(lengths: list[int], budget: int) -> None:
    rows = pack(lengths, budget)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[place] for place in row) <= budget or len(row) == 1
    # No two rows could have been one.
    sizes = sorted(sum(lengths[place] for place in row) for row in rows)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > budget


@given(LENGTHS, st.integers(1, 8))
def test_hands_are_even(sizes: list[int], workers: int) -> None:
    hands = deal(sizes, workers)
    assert sorted(place for hand in hands for place in hand) == list(range(len(sizes)))
    loads = [sum(sizes[place] for place in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(sizes, default=0)


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_sees_each_example_once(examples: int, batch: int, seed: int) -> None:
    steps = steps_per_epoch(examples, batch)
    for epoch in range(2):
        seen = [
            int(index)
            for step in range(1, steps + 1)
            for index in step_indices(examples, batch, seed, epoch * steps + step)
        ]
        assert sorted(seen) == list(range(examples))


def test_a_step_hangs_on_seed_and_number_alone() -> None:
    again = [step_indices(40, 8, 3, step).tolist() for step in (7, 2, 7)]
    assert again[0] == again[2] != again[1]
    assert step_indices(40, 8, 4, 7).tolist() != again[0]


def test_total_steps() -> None:
    assert total_steps(10, 4, 3, None) == 9
    assert total_steps(10, 4, 0.5, None) == 2
    assert total_steps(10, 4, 3, 5) == 5


def test_learning_rate() -> None:
    warm = TrainingConfig(learning_rate=1.0, warmup_steps=4, scheduler="constant")
    assert [learning_rate(warm, s, 10) for s in (1, 2, 4, 5, 10)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    line = TrainingConfig(learning_rate=1.0, scheduler="linear")
    assert [learning_rate(line, s, 4) for s in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = TrainingConfig(learning_rate=1.0, scheduler="cosine")
    assert abs(learning_rate(cosine, 3, 4) - 0.5) < 1e-12
