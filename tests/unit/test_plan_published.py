"""The plan's arithmetic against published figures: `python -m tests.benchmarks.published`."""

import pytest

from orchestrator.plan.parts import adapter_parameters
from tests.benchmarks.published import FIGURES, LLAMA_7B, LLAMA_65B, VERDICTS, plan, shape
from tests.unit.test_plan import GIB


@pytest.mark.parametrize("name", FIGURES)
def test_published_figure(name: str) -> None:
    figure = FIGURES[name]
    assert figure.computed() == pytest.approx(figure.published, rel=figure.tolerance)


@pytest.mark.parametrize("name", VERDICTS)
def test_published_verdict(name: str) -> None:
    verdict = VERDICTS[name]
    assert plan(verdict.base, verdict.memory, **verdict.sections).fits == verdict.fits


def test_65b_in_16_bit_takes_more_than_its_weights() -> None:
    parts = plan(LLAMA_65B, 48 * GIB, quantization={"type": "none"}).per_gpu_bytes
    assert parts["base"] > 130e9


def test_lora_of_02_percent_is_a_rank_of_ours() -> None:
    """0.2% of LLaMA 7B is what rank 5 or 6 on all linear layers comes to."""
    llama = shape(LLAMA_7B)
    sizes = [adapter_parameters(llama.linears, rank) for rank in (5, 6)]
    assert sizes[0] < 0.002 * llama.parameters < sizes[1]
