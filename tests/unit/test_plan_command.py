"""`orchestrator plan` as a command."""

import json
from pathlib import Path

import click.testing
import pytest

from orchestrator.cli import main
from tests.unit.test_plan import GIB

PARTS = [
    *["base", "adapters", "gradients", "optimizer"],
    *["activations", "logits", "overhead", "total"],
]
CONTRACT = {
    *["fits", "gpu_bytes", "per_gpu_bytes", "concurrent_trials", "tokens_per_pass"],
    *["disk_bytes", "advice"],
}


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(
        f"name: a\noutput_dir: {tmp_path}/runs\nmodel: {{base: meta-llama/Llama-3.1-8B}}\n"
        "data: {train: none.jsonl, max_length: 1024}\n"
    )
    return str(path)


def invoke(*arguments: str) -> click.testing.Result:
    ended = click.testing.CliRunner().invoke(main, ["plan", *arguments])
    assert ended.exit_code == 0, ended.output
    return ended


def test_json_goes_to_stdout_and_the_text_to_stderr(job: str) -> None:
    ended = invoke(job, "--gpu-memory", "24GiB", "--json")
    (line,) = ended.stdout.splitlines()
    plan = json.loads(line)
    assert plan.keys() >= CONTRACT
    parts = plan["per_gpu_bytes"]
    assert list(parts) == PARTS
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert plan["fits"] and plan["gpu_bytes"] == 24 * GIB and plan["gpus"] == 1
    assert ended.stderr.startswith("meta-llama/Llama-3.1-8B: 8.03B parameters")
    assert "fits: " in ended.stderr and "of 24.00 GiB on each GPU" in ended.stderr
    assert invoke(job, "--gpu-memory", "24GiB").stdout == ""


def test_the_text_names_every_part(job: str) -> None:
    text = invoke(job, "--gpu-memory", "24GiB", "--gpus", "8").stderr
    for part in (
        *["4-bit weights", "constants", "dense parts", "dequantized layer", "collective buffer"],
        *["with checkpointing", "without checkpointing", "a chunk", "framework"],
    ):
        assert f"    {part}" in text or f"  {part} " in text, part


def test_activations_are_told_with_and_without_checkpointing(job: str) -> None:
    sizes = {}
    for setting in ("true", "false"):
        given = ["--set", f"training.gradient_checkpointing={setting}"]
        given += ["--set", "training.tokens_per_pass=2048"]
        plan = json.loads(invoke(job, "--gpu-memory", "80GiB", "--json", *given).stdout)
        assert plan["gradient_checkpointing"] == (setting == "true")
        sizes[setting] = plan["per_gpu_bytes"]["activations"]
        told = plan["activations_with_checkpointing"], plan["activations_without_checkpointing"]
        assert plan["logits_chunk_bytes"] > 64 * 2**20
    assert told == (sizes["true"], sizes["false"]) and told[0] < told[1]


def test_what_does_not_fit_ends_with_0_and_says_so(job: str) -> None:
    ended = invoke(job, "--gpu-memory", "4GiB", "--json")
    assert not json.loads(ended.stdout)["fits"] and "does not fit: " in ended.stderr
    assert "exit status is 0" in invoke("--help").stdout


def test_a_job_for_the_cpu_is_planned_for_the_cpu(
    job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    # A GPU that is there and not asked for.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = [job, "--set", "cluster.gpus_per_worker=0", "--json"]
    given += ["--set", "model.base=HuggingFaceTB/SmolLM2-135M"]
    assert json.loads(invoke(*given).stdout)["device"] == "cpu"
    assert json.loads(invoke(*given, "--gpu-memory", "8GiB").stdout)["device"] == "cuda"
