"""The expected efficiency of many GPUs, and the table of it in infra/README.md."""

from pathlib import Path

import numpy as np
import pytest

from orchestrator.plan.scaling import (
    GIGABITS,
    GPUS,
    Step,
    efficiency,
    expected,
    ring_seconds,
    step_of,
    table,
)

README = Path(__file__).parents[2] / "infra" / "README.md"


def ring(workers: int, size: int, rate: float, hop: float) -> float:
    """Sum vectors around a ring, a chunk a round, and add up what the rounds take."""
    data = np.random.default_rng(0).normal(size=(workers, workers, size // workers))
    total, seconds = data.sum(axis=0), 0.0
    for phase in range(2):
        for round_number in range(workers - 1):
            sent = [
                (w, (w - round_number + phase) % workers, data[w].copy()) for w in range(workers)
            ]
            for worker, chunk, values in sent:
                right = data[(worker + 1) % workers]
                right[chunk] = values[chunk] + (right[chunk] if phase == 0 else 0)
            seconds += hop + data[0, 0].nbytes / rate
    np.testing.assert_allclose(data, np.broadcast_to(total, data.shape))
    return seconds


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_a_ring_takes_as_long_as_its_rounds(workers: int) -> None:
    size = 24 * workers
    count = size * 8
    assert ring_seconds(workers, count, 1e3, 0.5) == pytest.approx(ring(workers, size, 1e3, 0.5))


def test_one_worker_waits_for_nobody() -> None:
    assert ring_seconds(1, 10**9, 1e9, 1.0) == 0
    assert efficiency(Step(2.0, 10**9), 1, 1e9, 1.0, 1.0) == 1


def test_a_step_that_waits_as_long_as_it_computes_is_half_efficient() -> None:
    # Two workers exchange half of 2 GB twice, at 1 GB/s: 2 seconds.
    assert efficiency(Step(2.0, 2 * 10**9), 2, 1e9, 0.0, 1.0) == pytest.approx(0.5)
    assert efficiency(Step(2.0, 0), 2, 1e9, 0.0, 0.8) == pytest.approx(0.8)


def test_gradients_are_as_many_as_published() -> None:
    # PEFT prints 39,976,960 trainable parameters for Llama 2 7B, rank 16, all linear layers.
    assert step_of("7B", 16).gradient_bytes == 4 * 39_976_960
    assert step_of("7B", 64).gradient_bytes == 16 * 39_976_960


def test_more_gpus_scale_worse_and_faster_networks_better() -> None:
    for gigabits in GIGABITS:
        shares = [expected("7B", 64, gpus, gigabits) for gpus in GPUS]
        assert shares == sorted(shares, reverse=True) and 0 < shares[-1] < shares[0] < 1
    for gpus in GPUS:
        shares = [expected("7B", 64, gpus, gigabits) for gigabits in GIGABITS]
        assert shares == sorted(shares)


def test_the_readme_shows_what_the_code_computes() -> None:
    lines = README.read_text().splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("| base |"))
    size = len(table().splitlines())
    assert lines[first : first + size + 1] == [*table().splitlines(), ""]
