"""Runs in an object store: a real S3 server, machines that are caches of their own."""

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from mlflow import MlflowClient
from pyarrow.fs import FileSystem, copy_files

from tests.conftest import write_job
from tests.integration.conftest import Commands, curve, journal, reached, wait_for, wait_until
from tests.integration.store import CREDENTIALS, ObjectStore, mirror_of

JobFile = Callable[..., Path]
SECRET = CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
STEADY: dict[str, dict[str, Any]] = {
    "training": {"max_steps": 300, "batch_size": 4, "learning_rate": 1e-3},
    "evaluation": {"every": 100, "samples": 1},
    "checkpoint": {"every": 10},
}


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    started = ObjectStore()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Commands]:
    """A machine that knows nothing yet."""
    started = Commands(tmp_path / "machine")
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, chat_model: Path, cache: Path
) -> list[tuple[int, float, float]]:
    """The curve of a run in a folder that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    job = write_job(folder, chat_model, "whole", **STEADY)
    ended = Commands(cache).run("finetune", job, "--local")
    assert ended.status == 0, ended.err
    return curve(folder / "runs" / "whole")


def test_a_run_on_ray_lies_in_the_bucket_for_every_machine(
    commands: Commands,
    machine: Commands,
    job_file: JobFile,
    store: ObjectStore,
    tmp_path: Path,
    chat_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user = f"tester:{SECRET}@"
    uri = store.uri("deep/runs", user=user)
    job = job_file("bot", output_dir=uri, cluster={"address": "local"})
    ended = commands.run("finetune", job, "--json")
    assert ended.status == 0, ended.err
    result = ended.result
    assert result["steps"] == 12 and result["restarts"] == 0
    assert result["adapter"] == store.uri("deep/runs/bot/adapter").replace("http:", "http%3A")
    assert [step for step, *_ in store.curve("deep/runs/bot")] == list(range(1, 13))
    assert store.events("deep/runs/bot")[-1]["status"] == "finished"
    assert json.loads(store.read("deep/runs/bot/result.json")) == result
    assert "reversed" not in ended.err and store.read("deep/runs/bot/samples.jsonl")
    assert store.checkpoints("deep/runs/bot") >= {"step-00000012"}
    _assert_loadable(result["adapter"], tmp_path / "adapter", chat_model)

    # MLflow's own store lies on the machine of the command, with all that was trained.
    mirror = mirror_of(commands, uri, monkeypatch)
    client = MlflowClient(f"sqlite:///{mirror / 'mlflow.db'}")
    assert {"adapter", "samples.json"} <= {a.path for a in client.list_artifacts(result["run_id"])}
    history = client.get_metric_history(result["run_id"], "loss")
    assert sorted((m.step, m.value) for m in history) == [
        (step, loss) for step, loss, _ in store.curve("deep/runs/bot")
    ]

    again = machine.call("finetune", job, "--json")
    assert again.status == 0 and "finished" in again.err
    assert {**again.result, "run_id": None} == {**result, "run_id": None}

    texts = [ended.out, ended.err, again.out, again.err]
    files = [path for path in mirror.rglob("*") if path.is_file()]
    assert any(path.name == "job.yaml" for path in files)
    assert SECRET not in "".join(texts)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    for name in ("job.yaml", "journal.jsonl", "result.json"):
        assert SECRET.encode() not in store.read(f"deep/runs/bot/{name}")


def _assert_loadable(uri: str, folder: Path, model: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    files, path = FileSystem.from_uri(uri)
    folder.mkdir()
    copy_files(path, str(folder), source_filesystem=files)
    plain = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(3, 40)[None]
    before = plain(ids).logits
    adapted = PeftModel.from_pretrained(plain, folder).eval()
    assert (adapted(ids).logits - before).abs().max() > 1e-3


@pytest.mark.cluster
def test_killed_and_gone_on_with_on_a_machine_that_knows_nothing(
    commands: Commands,
    machine: Commands,
    job_file: JobFile,
    store: ObjectStore,
    whole: list[tuple[int, float, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = store.uri("killed")
    job = job_file("killed", output_dir=uri, **STEADY)
    process = commands.start("finetune", job, "--local")
    mirror = mirror_of(commands, uri, monkeypatch) / "killed"

    def in_the_store(events: list[dict[str, Any]]) -> bool:
        return reached(60)(events) and bool(store.checkpoints("killed/killed"))

    wait_for(mirror, in_the_store, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(mirror.parent)

    ended = machine.run("finetune", job, "--local", "--json")
    assert ended.status == 0, ended.err
    starts = [e for e in store.events("killed/killed") if e["event"] == "start"]
    assert len(starts) == 2 and starts[1]["resumed_from"] > 0
    assert store.curve("killed/killed") == whole


@pytest.mark.cluster
def test_a_store_that_is_away_for_a_while(
    commands: Commands,
    job_file: JobFile,
    store: ObjectStore,
    whole: list[tuple[int, float, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = store.uri("away")
    job = job_file("away", output_dir=uri, **STEADY)
    process = commands.start("finetune", job, "--local", "--json")
    mirror = mirror_of(commands, uri, monkeypatch) / "away"
    wait_for(mirror, reached(10), process)
    store.away()
    try:
        wait_for(mirror, reached(150), process)
    finally:
        store.back()
    ended = commands.wait(process)
    assert ended.status == 0, ended.err
    assert store.curve("away/away") == whole == curve(mirror)
    assert "step-00000300" in store.checkpoints("away/away")


@pytest.mark.cluster
def test_a_store_that_never_takes_the_adapter_fails_the_run(
    machine: Commands, job_file: JobFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.storage.background._PATIENCE_SECONDS", 1.0)
    store = ObjectStore()
    uri = store.uri("lost")
    mirror = mirror_of(machine, uri, monkeypatch) / "lost"

    def lose() -> None:
        wait_until(lambda: any((mirror / "checkpoints").glob("step-*")), "a step is saved")
        store.close()

    losing = threading.Thread(target=lose)
    losing.start()
    ended = machine.call("finetune", job_file("lost", output_dir=uri), "--local", "--json")
    losing.join()
    assert ended.status == 1 and ended.result["status"] == "failed"
    error = ended.result["error"]
    assert "does not take what was trained" in error and str(mirror) in error
    assert (mirror / "adapter" / "adapter_model.safetensors").exists()
    assert reached(12)(journal(mirror))


def test_stores_that_cannot_be_used_are_refused_before_any_work(
    machine: Commands, job_file: JobFile, store: ObjectStore, tmp_path: Path
) -> None:
    def refused(uri: str) -> str:
        ended = machine.call("finetune", job_file(output_dir=uri), "--local", "--json")
        assert ended.status == 2, ended.err
        return str(ended.result["error"])

    assert "does not exist" in refused(store.uri("runs", bucket="nothing"))
    assert "foo" in refused(store.uri("runs") + "&foo=1")
    other = f"wrong:{SECRET[::-1]}@"
    _authenticate(store, "0")
    try:
        denied = refused(store.uri("denied", user=other))
    finally:
        _authenticate(store, "1000000")
    assert "ACCESS" in denied.upper() and SECRET[::-1] not in denied
    assert not list((tmp_path / "machine").glob("bases/*"))


def _authenticate(store: ObjectStore, free: str) -> None:
    """After so many requests, the server wants credentials that it knows."""
    request = Request(
        f"{store.endpoint}/moto-api/reset-auth",
        data=free.encode(),
        headers={"Content-Type": "text/plain"},
    )
    urlopen(request, timeout=10).close()


def test_a_sweep_is_refused(machine: Commands, job_file: JobFile, store: ObjectStore) -> None:
    space = {"lora.rank": {"choice": [2, 4]}}
    job = job_file(output_dir=store.uri("sweep"), sweep={"search_space": space, "trials": 2})
    ended = machine.call("sweep", job, "--json")
    assert ended.status == 2 and "output_dir" in ended.result["error"]
