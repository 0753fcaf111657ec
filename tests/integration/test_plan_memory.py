"""Predicted against measured peak memory of real steps, each in a process of its own."""

from pathlib import Path

import pytest

from tests.benchmarks.memory import ALLOWED, CASES, Case, compare

pytestmark = pytest.mark.memory

SMALL = {
    "plain": CASES["tiny"],
    "checkpointing": Case("llama-tiny", rank=64, tokens=512, length=128, checkpointing=True),
    "two tenants": CASES["tiny-2-tenants"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize("name", SMALL)
def test_the_plan_is_right_within_a_tenth(folder: Path, name: str) -> None:
    predicted, measured = compare(SMALL[name], folder)
    assert predicted == pytest.approx(measured, rel=ALLOWED)


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"tiny", "tiny-2-tenants"}))
def test_the_table_is_right_within_a_tenth(folder: Path, name: str) -> None:
    """All jobs of `python -m tests.benchmarks.memory`; too long for `make test-memory`."""
    predicted, measured = compare(CASES[name], folder)
    assert predicted == pytest.approx(measured, rel=ALLOWED)
