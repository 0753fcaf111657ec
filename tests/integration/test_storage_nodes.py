"""Two nodes that share nothing but an object store, and a leader that dies."""

import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_job
from tests.integration.cluster import RayCluster
from tests.integration.conftest import Commands, curve, reached, wait_for
from tests.integration.store import CREDENTIALS, ObjectStore, mirror_of

pytestmark = pytest.mark.cluster

SETTINGS: dict[str, Any] = {
    "training": {"max_steps": 240, "batch_size": 7, "learning_rate": 1e-3},
    "evaluation": {"every": 1000, "samples": 0},
    "checkpoint": {"every": 10},
}


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    started = ObjectStore()
    yield started
    started.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with pytest.MonkeyPatch.context() as environment:
        # Nobody is there: a URI that does not name its server leads the nodes nowhere.
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
            environment.setenv(name, value)
        started = RayCluster(tmp_path_factory.mktemp("cluster"))
        try:
            started.add(cpus=1)
            started.add(cpus=1)
            yield started
        finally:
            started.close()


def test_nodes_meet_in_the_store(
    commands: Commands,
    cluster: RayCluster,
    store: ObjectStore,
    tmp_path: Path,
    chat_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_file: Callable[..., Path] = partial(write_job, tmp_path, chat_model, **SETTINGS)
    assert commands.call("finetune", job_file("alone"), "--local").status == 0

    where = {"address": cluster.address, "workers": 2, "collective_timeout": 30}
    uri = store.uri("nodes")
    job = job_file("two", output_dir=uri, cluster=where)
    command = commands.start("finetune", job, "--json", **cluster.environment)
    mirror = mirror_of(commands, uri, monkeypatch) / "two"
    wait_for(mirror, reached(30), command)
    leader = next(
        worker
        for node in cluster.nodes
        for worker in node.workers()
        if any(file.path.endswith("journal.jsonl") for file in worker.open_files())
    )
    leader.kill()
    ended = commands.wait(command)
    assert ended.status == 0, ended.err
    assert ended.result["restarts"] == 1 and ended.result["workers"] == 2

    starts = [e["resumed_from"] for e in store.events("nodes/two") if e["event"] == "start"]
    assert len(starts) == 2 and starts[1] > 0
    found, whole = store.curve("nodes/two"), curve(tmp_path / "runs" / "alone")
    assert [step for step, *_ in found] == [step for step, *_ in whole]
    for (_, loss, norm), (_, other, other_norm) in zip(found, whole, strict=True):
        assert loss == pytest.approx(other, rel=1e-4)
        assert norm == pytest.approx(other_norm, rel=1e-3)

    said = [e["message"] for e in store.events("nodes/two") if e["event"] == "warning"]
    assert sum("Quantizing" in message for message in said) == 1
    for node in cluster.nodes:
        assert len(list(node.cache.glob("bases/*/entry.json"))) == 1
        assert list(node.cache.glob("runs/*/.workers/two/checkpoints/step-*"))


def test_the_wish_to_stop_reaches_the_workers_through_the_store(
    commands: Commands,
    cluster: RayCluster,
    store: ObjectStore,
    tmp_path: Path,
    chat_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = {**SETTINGS, "training": {**SETTINGS["training"], "max_steps": 3000}}
    where = {"address": cluster.address, "workers": 2, "collective_timeout": 30}
    uri = store.uri("stopped")
    job = write_job(tmp_path, chat_model, "long", output_dir=uri, cluster=where, **long)
    command = commands.start("finetune", job, "--json", **cluster.environment)
    wait_for(mirror_of(commands, uri, monkeypatch) / "long", reached(5), command)
    command.send_signal(signal.SIGINT)
    ended = commands.wait(command)
    assert ended.status == 130 and "s3://tests/stopped/long" in ended.result["error"]
    steps = [step for step, *_ in store.curve("stopped/long")]
    assert steps == list(range(1, len(steps) + 1)) and 5 <= len(steps) < 3000
    assert f"step-{len(steps):08d}" in store.checkpoints("stopped/long")


def test_a_node_that_does_not_reach_the_store_is_noticed(
    commands: Commands, cluster: RayCluster, store: ObjectStore, tmp_path: Path, chat_model: Path
) -> None:
    where = {"address": cluster.address, "workers": 2, "collective_timeout": 30}
    plain = store.uri("unseen").partition("?")[0] + "?region=us-east-1"
    job = write_job(tmp_path, chat_model, "unseen", output_dir=plain, cluster=where)
    reach = {**CREDENTIALS, "AWS_ENDPOINT_URL": store.endpoint}
    command = commands.start("finetune", job, "--json", **reach, **cluster.environment)
    ended = commands.wait(command)
    assert ended.status == 2 and "unseen" in ended.result["error"], ended.err
