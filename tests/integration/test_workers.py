"""Several workers on several nodes: the same curve, one quantization, requests that are refused."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.integration.cluster import RayCluster
from tests.integration.conftest import Commands, curve, journal

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

JobFile = Callable[..., Path]
# Uneven lengths, and a last batch of an epoch with fewer examples than the others.
TRAINING = {"max_steps": 30, "batch_size": 7}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    started = RayCluster(tmp_path_factory.mktemp("cluster"))
    try:
        for _ in range(2):
            started.add(cpus=2, gpus=2)
        yield started
    finally:
        started.close()


def test_one_two_and_four_workers_give_one_curve_and_one_adapter(
    commands: Commands, job_file: JobFile, tmp_path: Path, cluster: RayCluster
) -> None:
    runs = tmp_path / "runs"
    assert commands.call("finetune", job_file("one", training=TRAINING), "--local").status == 0
    whole, adapter = curve(runs / "one"), load_file(runs / "one/adapter/adapter_model.safetensors")
    for workers in (2, 4):
        name = f"of{workers}"
        where = {"address": cluster.address, "workers": workers, "collective_timeout": 60}
        job = job_file(name, training=TRAINING, cluster=where)
        ended = commands.run("finetune", job, "--json", **cluster.environment)
        assert ended.status == 0, ended.err
        assert ended.result["workers"] == workers and ended.result["restarts"] == 0
        found = curve(runs / name)
        assert [step for step, *_ in found] == list(range(1, 31))
        for (_, loss, norm), (_, other, other_norm) in zip(found, whole, strict=True):
            assert loss == pytest.approx(other, rel=1e-5)
            assert norm == pytest.approx(other_norm, rel=1e-4)
        assert_close(
            load_file(runs / name / "adapter/adapter_model.safetensors"),
            adapter,
            rtol=1e-3,
            atol=1e-5,
        )
    events = [event for name in ("of2", "of4") for event in journal(runs / name)]
    quantized = [e for e in events if e["event"] == "warning" and "Quantizing" in e["message"]]
    assert len(quantized) == 1, "one worker quantizes for the whole cluster, and says so once"
    for node in cluster.nodes:
        assert len(list(node.cache.glob("bases/*/entry.json"))) == 1


def test_more_than_the_cluster_can_have_is_refused_before_the_wait(
    commands: Commands, job_file: JobFile, tmp_path: Path, cluster: RayCluster
) -> None:
    job = job_file(cluster={"address": cluster.address, "workers": 64})
    ended = commands.run("finetune", job, "--json", **cluster.environment)
    assert ended.status == 2 and "4 CPUs and 4 GPUs" in ended.result["error"]


def test_a_folder_that_is_not_shared_is_noticed(
    commands: Commands, job_file: JobFile, tmp_path: Path, cluster: RayCluster
) -> None:
    """Two machines with folders of one name: here a mount that only the command sees."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    folder = tmp_path / "mounted"
    folder.mkdir()
    job = job_file(output_dir=str(folder), cluster={"address": cluster.address, "workers": 2})
    mounted = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {folder} && exec "$@"', "sh"]
    command = commands.start("finetune", job, "--json", prefix=mounted, **cluster.environment)
    ended = commands.wait(command)
    assert ended.status == 2 and "share" in ended.result["error"], ended.err


def test_without_the_token_nobody_is_let_in(
    commands: Commands, job_file: JobFile, cluster: RayCluster, tmp_path: Path
) -> None:
    job = job_file(cluster={"address": cluster.address})
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
    ended = commands.run("finetune", job, "--json", **wrong)
    assert ended.status == 2 and "RAY_AUTH_TOKEN" in ended.result["error"]
    assert cluster.token not in ended.err + ended.out
