"""`orchestrator finetune` from outside: what comes out, and what survives."""

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.conftest import write_chats, write_job
from tests.integration.conftest import Commands, curve, journal, reached, wait_for

JobFile = Callable[..., Path]
FIELDS = {
    "status", "name", "run_id", "steps", "tokens", "initial_eval_loss", "eval_loss", "train_loss",
    "tokens_per_second", "peak_memory_bytes", "workers", "restarts", "adapter", "model_version",
}  # fmt: skip


def _client(run_dir: Path) -> MlflowClient:
    uri = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _assert_delivered_once(run_dir: Path, run_id: str) -> None:
    client = _client(run_dir)
    for name in ("loss", "gradient_norm", "learning_rate"):
        delivered = sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))
        kept = [(e["step"], e[name]) for e in journal(run_dir) if e["event"] == "step"]
        assert delivered == kept


def test_one_command_gives_everything(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    job = job_file(tracking={"registered_model": "bot"})
    ended = commands.run("finetune", job, "--local", "--json")
    assert ended.status == 0, ended.err
    result, run_dir = ended.result, tmp_path / "runs" / "tiny"
    assert set(result) == FIELDS
    assert result["status"] == "finished" and result["steps"] == 12 and result["restarts"] == 0
    assert result["eval_loss"] < result["initial_eval_loss"]
    events = journal(run_dir)
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 13))
    assert [e["step"] for e in events if e["event"] == "evaluation"] == [0, 5, 10, 12]
    assert result["tokens"] == sum(e["tokens"] for e in events if e["event"] == "step")
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [(s["when"], s["index"]) for s in samples] == [
        ("before", 0), ("before", 1), ("after", 0), ("after", 1),
    ]  # fmt: skip
    assert (run_dir / "job.yaml").exists()
    assert len(list((run_dir / "checkpoints").glob("step-*"))) <= 3

    client = _client(run_dir)
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["lora.rank"] == "4" and run.data.params["training.batch_size"] == "4"
    assert run.data.tags["base.hash"] and run.inputs.dataset_inputs[0].dataset.digest
    _assert_delivered_once(run_dir, result["run_id"])
    artifacts = {a.path for a in client.list_artifacts(result["run_id"])}
    assert {"adapter", "plots", "samples.json", "job.yaml", "environment.json"} <= artifacts
    planned = json.loads(Path(client.download_artifacts(result["run_id"], "plan.json")).read_text())
    assert planned["measured"]["peak_memory_bytes"] == result["peak_memory_bytes"]
    total = planned["planned"]["per_gpu_bytes"]["total"]
    assert run.data.tags["plan.total_bytes"] == str(total)
    assert run.data.tags["measured.peak_memory_bytes"] == str(result["peak_memory_bytes"])
    champion = client.get_model_version_by_alias("bot", "champion")
    assert str(champion.version) == result["model_version"] == "1"

    again = commands.call("finetune", job, "--local", "--json")
    assert again.status == 0 and "finished" in again.err
    assert again.result == result and journal(run_dir) == events

    worse = job_file("worse", tracking={"registered_model": "bot"}, training={"max_steps": 1})
    second = commands.call("finetune", worse, "--local", "--json")
    assert second.result["model_version"] == "2"
    assert str(client.get_model_version_by_alias("bot", "champion").version) == "1"


def test_adapter_loads_through_peft(
    commands: Commands, job_file: JobFile, tmp_path: Path, chat_model: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job = job_file(training={"max_steps": 3}, quantization={"type": "none"}, lora={"rslora": True})
    result = commands.call("finetune", job, "--local", "--json").result
    ids = torch.arange(3, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(chat_model)
    before = plain(ids).logits
    adapted = PeftModel.from_pretrained(plain, result["adapter"]).eval()
    assert (adapted(ids).logits - before).abs().max() > 1e-3


STEADY: dict[str, dict[str, object]] = {
    "lora": {"rank": 4, "dropout": 0.1},
    "training": {"max_steps": 60, "batch_size": 4, "learning_rate": 5e-3, "scheduler": "cosine"},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, chat_model: Path, cache: Path) -> Path:
    """The run folder of a job that nothing disturbed."""
    started = Commands(cache)
    folder = tmp_path_factory.mktemp("undisturbed")
    job = write_job(folder, chat_model, "whole", **STEADY)
    ended = started.run("finetune", job, "--local")
    assert ended.status == 0, ended.err
    return folder / "runs" / "whole"


def _result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())


@pytest.mark.fault
def test_killed_anywhere_the_curve_is_the_same(
    commands: Commands, job_file: JobFile, tmp_path: Path, undisturbed: Path
) -> None:
    job, run_dir = job_file("killed", **STEADY), tmp_path / "runs" / "killed"
    checkpoints = run_dir / "checkpoints"
    moments = [
        lambda events: any(e["event"] == "evaluation" for e in events),
        reached(2),
        lambda events: any(checkpoints.glob(".step-*")) or reached(20)(events),
        reached(40),
        lambda events: any(e["event"] == "evaluation" and e["step"] == 60 for e in events),
    ]
    for moment in moments:
        process = commands.start("finetune", job, "--local")
        wait_for(run_dir, moment, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    ended = commands.call("finetune", job, "--local", "--json")
    assert ended.status == 0, ended.err
    assert curve(run_dir) == curve(undisturbed)
    for key in ("eval_loss", "initial_eval_loss", "train_loss", "tokens", "steps"):
        assert ended.result[key] == _result(undisturbed)[key]
    _assert_delivered_once(run_dir, ended.result["run_id"])
    client = _client(run_dir)
    experiments = [e.experiment_id for e in client.search_experiments()]
    assert [run.info.run_name for run in client.search_runs(experiments)] == ["killed"]


def test_damaged_checkpoint_is_named_and_passed_over(
    commands: Commands, job_file: JobFile, tmp_path: Path, undisturbed: Path
) -> None:
    job, run_dir = job_file("cut", **STEADY), tmp_path / "runs" / "cut"
    process = commands.start("finetune", job, "--local")
    wait_for(run_dir, reached(8), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = max((run_dir / "checkpoints").glob("step-*"))
    weights = newest / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    ended = commands.call("finetune", job, "--local")
    said = ended.err.replace("\n", "")
    assert ended.status == 0 and "damaged" in said and newest.name in said
    assert curve(run_dir) == curve(undisturbed)
    # The kill fell into the first moments of MLflow's store, which must not be spoilt by it.
    assert "wait in" not in said and _client(run_dir).search_experiments()


def test_interrupt_saves_and_says_how_to_go_on(
    commands: Commands, job_file: JobFile, tmp_path: Path, undisturbed: Path
) -> None:
    job, run_dir = job_file("stopped", **STEADY), tmp_path / "runs" / "stopped"
    process = commands.start("finetune", job, "--local", "--json")
    wait_for(run_dir, reached(4), process)
    process.send_signal(signal.SIGINT)
    ended = commands.wait(process)
    assert ended.status == 130 and ended.result["status"] == "interrupted"
    assert "same command again" in ended.err
    done = curve(run_dir)[-1][0]
    assert done < 60 and (run_dir / "checkpoints" / f"step-{done:08d}").is_dir()
    assert commands.call("finetune", job, "--local").status == 0
    assert curve(run_dir) == curve(undisturbed)


def test_refusals_come_before_any_work(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    job = job_file()
    unknown = commands.call("finetune", job, "--set", "lora.rnak=8", "--local", "--json")
    assert unknown.status == 2 and "lora.rank" in unknown.err
    assert unknown.result["status"] == "refused"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a", "answer": "b"}\n{"question": "a"\n')
    data = commands.call("finetune", job, "--set", f"data.train={bad}", "--local")
    assert data.status == 2 and "bad.jsonl:2" in data.err.replace("\n", "")
    run_dir = tmp_path / "runs" / "tiny"
    run = _client(run_dir).get_run(_result(run_dir)["run_id"])
    assert _result(run_dir)["status"] == run.data.tags["state"] == "refused"
    assert run.info.status == "FAILED"
    missing = commands.call("finetune", job, "--set", "model.base=./nothing", "--local")
    assert missing.status == 2 and "model.base" in missing.err
    assert not list((tmp_path / "runs").glob("*/checkpoints"))


def test_a_run_goes_on_only_with_its_own_settings(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    job = job_file(training={"max_steps": 4})
    assert commands.call("finetune", job, "--local").status == 0
    other = commands.call("finetune", job, "--local", "--set", "lora.rank=8")
    assert other.status == 2 and "lora.rank was 4, is now 8" in other.err.replace("\n", " ")
    longer = commands.call("finetune", job, "--local", "--json", "--set", "training.max_steps=6")
    assert longer.status == 0 and longer.result["steps"] == 6
    run_dir = tmp_path / "runs" / "tiny"
    assert [step for step, *_ in curve(run_dir)] == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(run_dir)


def test_a_secret_in_the_job_neither_bars_going_on_nor_is_printed(
    commands: Commands, job_file: JobFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_PASSWORD", "swordfish-0123456789")
    data = write_chats(tmp_path / "swordfish-0123456789.jsonl", 30)
    job = job_file(training={"max_steps": 2}, data={"train": str(data)})
    assert commands.call("finetune", job, "--local").status == 0
    longer = commands.call("finetune", job, "--local", "--json", "--set", "training.max_steps=3")
    assert longer.status == 0 and longer.result["steps"] == 3, longer.err
    other = commands.call("finetune", job, "--local", "--set", "training.seed=1")
    assert other.status == 2 and "training.seed" in other.err
    assert "swordfish" not in other.err + (tmp_path / "runs/tiny/job.yaml").read_text()


def test_infinite_loss_fails_with_a_clear_word(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    job = job_file(training={"learning_rate": 1e30, "max_grad_norm": None})
    ended = commands.call("finetune", job, "--local", "--json")
    assert ended.status == 1 and ended.result["status"] == "failed"
    assert "learning_rate" in ended.err and "loss of step" in ended.err.lower()
    kept = json.loads((tmp_path / "runs" / "tiny" / "result.json").read_text())
    assert (kept["status"], kept["error"]) == ("failed", ended.result["error"])


def test_python_api(job_file: JobFile, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator import finetune

    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(cache))
    said: list[str] = []
    result = finetune(job_file(), overrides=["training.max_steps=2"], local=True, say=said.append)
    assert result["steps"] == 2 and math.isfinite(result["eval_loss"])
