"""Predicted against measured peak memory of real steps, each in a process of its own."""

from pathlib import Path

import pytest

from tests.benchmarks.memory import ALLOWED, Case, compare

CASES = {
    "plain": Case("llama-tiny", rank=8),
    "checkpointing": Case("llama-tiny", rank=64, tokens=512, length=128, checkpointing=True),
    "two tenants": Case("llama-tiny", rank=8, tenants=2, tokens=512, length=64),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_right_within_a_tenth(folder: Path, name: str) -> None:
    predicted, measured = compare(CASES[name], folder)
    assert predicted == pytest.approx(measured, rel=ALLOWED)
