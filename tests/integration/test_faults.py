"""Parts that die while two workers train: the curve is the undisturbed run's, whatever died."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from tests.conftest import write_job
from tests.integration.cluster import Node, RayCluster, stop
from tests.integration.conftest import (
    Commands,
    Ended,
    curve,
    journal,
    reached,
    wait_for,
    wait_until,
)
from tests.integration.test_tracking_delivery import Server, steps_in

# Each restart takes its time on a machine with much to do; no test asserts how long.
pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.timeout(900)]

JobFile = Callable[..., Path]
Curve = list[tuple[int, float, float]]
STEPS = 240
SETTINGS: dict[str, Any] = {
    "training": {"max_steps": STEPS, "batch_size": 7, "learning_rate": 1e-3},
    "evaluation": {"every": 1000, "samples": 0},
    "checkpoint": {"every": 10, "keep": 3},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    started = RayCluster(tmp_path_factory.mktemp("cluster"))
    try:
        started.add(cpus=1)
        started.add(cpus=1)
        yield started
    finally:
        started.close()


class Runs:
    """Jobs of two workers on the cluster."""

    def __init__(self, commands: Commands, job_file: JobFile, cluster: RayCluster) -> None:
        self.commands, self.cluster, self._job_file = commands, cluster, job_file

    def start(
        self,
        name: str,
        training: dict[str, Any] | None = None,
        tracking: dict[str, Any] | None = None,
        **where: Any,
    ) -> tuple[subprocess.Popen[str], Path]:
        cluster = {"address": self.cluster.address, "workers": 2, "collective_timeout": 20, **where}
        job = self.job(name, training, cluster=cluster, tracking=tracking or {})
        command = self.commands.start("finetune", job, "--json", **self.cluster.environment)
        return command, job.parent / "runs" / name

    def job(self, name: str, training: dict[str, Any] | None = None, **sections: Any) -> Path:
        settings = {**SETTINGS, "training": {**SETTINGS["training"], **(training or {})}}
        return self._job_file(name, **settings, **sections)

    def workers(self) -> list[psutil.Process]:
        """Rank 0 first: the leader is the one that holds the journal open."""
        found = [worker for node in self.cluster.nodes for worker in node.workers()]
        return sorted(found, key=lambda worker: not _holds_journal(worker))


@pytest.fixture
def runs(commands: Commands, job_file: JobFile, cluster: RayCluster) -> Runs:
    while len(cluster.nodes) < 2:
        cluster.add(cpus=1)
    return Runs(commands, job_file, cluster)


@pytest.fixture(scope="module")
def whole(
    cluster: RayCluster, cache: Path, chat_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Curve:
    """The curve of an undisturbed run of two workers."""
    folder = tmp_path_factory.mktemp("whole")
    undisturbed = Runs(Commands(cache), partial(write_job, folder, chat_model), cluster)
    command, run_dir = undisturbed.start("whole")
    assert undisturbed.commands.wait(command).status == 0
    return curve(run_dir)


def _holds_journal(process: psutil.Process) -> bool:
    # It may end meanwhile.
    with suppress(psutil.Error):
        return any(file.path.endswith("journal.jsonl") for file in process.open_files())
    return False


def _has_torch(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any("libtorch" in area.path for area in process.memory_maps())
    return False


def _assert_alike(found: Curve, whole: Curve) -> None:
    """Equal but for rounding: a resized run adds the same numbers up in another order."""
    assert [step for step, *_ in found] == [step for step, *_ in whole]
    for (step, loss, norm), (_, other, other_norm) in zip(found, whole, strict=True):
        assert loss == pytest.approx(other, rel=1e-4), step
        assert norm == pytest.approx(other_norm, rel=1e-3), step


def _starts(run_dir: Path) -> list[int]:
    return [e["resumed_from"] for e in journal(run_dir) if e["event"] == "start"]


def _assert_little_lost(run_dir: Path) -> None:
    """Each start goes on at most `checkpoint.every` steps before what had been reached."""
    seen = 0
    for event in journal(run_dir):
        if event["event"] == "start":
            assert seen - event["resumed_from"] <= 10
        elif event["event"] == "step":
            seen = max(seen, event["step"])


def test_workers_die_in_a_pass_in_the_collective_and_in_a_checkpoint(
    runs: Runs, whole: Curve
) -> None:
    command, run_dir = runs.start("dying", max_failures=4)

    wait_for(run_dir, reached(15), command)
    # Passes fill nearly all of a step.
    runs.workers()[1].kill()

    wait_for(run_dir, lambda events: len(_begun(events)) == 2 and reached(40)(events), command)
    leader, other = runs.workers()
    # Without the other, the leader comes to the collective and waits there.
    stop(other)
    time.sleep(1)
    leader.kill()

    wait_for(run_dir, lambda events: len(_begun(events)) == 3 and reached(80)(events), command)
    (leader, _) = runs.workers()
    wait_until(lambda: any((run_dir / "checkpoints").glob(".step-*")), "a checkpoint is written")
    leader.kill()

    ended = runs.commands.wait(command)
    assert ended.status == 0, ended.err
    assert ended.result["restarts"] == 3 and ended.result["workers"] == 2
    assert curve(run_dir) == whole
    _assert_little_lost(run_dir)


def test_a_worker_that_hangs_counts_as_dead(runs: Runs, whole: Curve) -> None:
    command, run_dir = runs.start("hanging")
    wait_for(run_dir, reached(15), command)
    stop(runs.workers()[1])
    ended = runs.commands.wait(command)
    assert ended.status == 0, ended.err
    assert ended.result["restarts"] == 1
    assert curve(run_dir) == whole
    _assert_little_lost(run_dir)


def test_a_killed_driver_and_a_newest_checkpoint_cut_in_half(runs: Runs, whole: Curve) -> None:
    command, run_dir = runs.start("driver")
    wait_for(run_dir, reached(45), command)
    command.kill()
    command.communicate()
    wait_until(lambda: not runs.workers(), "the workers of the dead driver are gone")
    newest = max((run_dir / "checkpoints").glob("step-*"))
    weights = newest / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])

    command, _ = runs.start("driver")
    ended = runs.commands.wait(command)
    assert ended.status == 0, ended.err
    assert _starts(run_dir) == [0, int(newest.name.removeprefix("step-")) - 10]
    damaged = [e for e in journal(run_dir) if newest.name in e.get("message", "")]
    assert len(damaged) == 1, "the damaged checkpoint is named, once"
    assert curve(run_dir) == whole


def test_storage_that_is_away_for_a_while(runs: Runs, whole: Curve) -> None:
    command, run_dir = runs.start("storage")
    wait_for(run_dir, reached(15), command)
    folder = run_dir / "checkpoints"
    folder.rename(run_dir / "away")
    # A file where the folder was refuses everything.
    folder.touch()
    step = journal(run_dir)[-1].get("step", 15)
    wait_for(run_dir, reached(step + 40), command)
    folder.unlink()
    (run_dir / "away").rename(folder)
    ended = runs.commands.wait(command)
    assert ended.status == 0, ended.err
    assert ended.result["restarts"] == 0
    said = [e["message"] for e in journal(run_dir) if e["event"] == "warning"]
    assert sum("cannot be written" in message for message in said) == 1
    assert curve(run_dir) == whole
    _assert_little_lost(run_dir)


def test_a_worker_that_dies_before_all_have_met_is_no_failure(runs: Runs, whole: Curve) -> None:
    command, run_dir = runs.start("meeting", max_failures=0)
    come: list[psutil.Process] = []

    def one_has_come() -> bool:
        # Ray gives a worker another name while it is in a call: it is found by that only now.
        come.extend(filter(_has_torch, runs.workers()))
        return bool(come)

    wait_until(one_has_come, "a worker has come to meet the other")
    come[0].kill()
    ended = runs.commands.wait(command)
    assert ended.status == 0, ended.err
    assert _starts(run_dir) == [0] and ended.result["workers"] == 2
    assert curve(run_dir) == whole


def test_mlflow_is_killed_and_started_again(runs: Runs, whole: Curve, tmp_path: Path) -> None:
    server = Server(tmp_path / "server")
    try:
        server.start()
        where = {"uri": f"http://127.0.0.1:{server.port}"}
        command, run_dir = runs.start("tracked", tracking=where)
        wait_for(run_dir, reached(15), command)
        server.kill()
        wait_for(run_dir, reached(60), command)
        server.start()
        ended = runs.commands.wait(command)
        assert ended.status == 0 and ended.result["restarts"] == 0, ended.err
        assert curve(run_dir) == whole
        client = MlflowClient(where["uri"])
        assert sorted(steps_in(client, ended.result["run_id"])) == list(range(1, STEPS + 1))
    finally:
        server.kill()


def test_one_interrupt_ends_a_run_that_waits_for_another_worker(
    runs: Runs, cluster: RayCluster, whole: Curve
) -> None:
    command, run_dir = runs.start("waiting")
    wait_for(run_dir, reached(15), command)
    cluster.kill(_node_of_follower(cluster))
    wait_until(lambda: not runs.workers(), "the leader has ended, for its peer is gone")

    command.send_signal(signal.SIGINT)
    ended = runs.commands.wait(command)
    assert ended.status == 130 and "same command again" in ended.result["error"], ended.err

    cluster.add(cpus=1)
    command, _ = runs.start("waiting")
    ended = runs.commands.wait(command)
    assert ended.status == 0, ended.err
    assert curve(run_dir) == whole
    _assert_little_lost(run_dir)


def test_one_interrupt_ends_an_elastic_run_below_its_least(runs: Runs, cluster: RayCluster) -> None:
    command, run_dir = runs.start("below", workers=[2, 3])
    wait_for(run_dir, reached(15), command)
    cluster.kill(_node_of_follower(cluster))
    wait_until(lambda: not any(map(_holds_journal, runs.workers())), "the leader works no more")
    # It lives on meanwhile: its place is kept for the next start.
    command.send_signal(signal.SIGINT)
    ended = runs.commands.wait(command)
    assert ended.status == 130 and "waited for its workers" in ended.result["error"], ended.err


def test_after_max_failures_the_job_ends_and_says_how_to_go_on(runs: Runs) -> None:
    command, run_dir = runs.start("failing", max_failures=0)
    wait_for(run_dir, reached(15), command)
    runs.workers()[1].kill()
    ended: Ended = runs.commands.wait(command)
    assert ended.status == 1 and ended.result["status"] == "failed"
    message = ended.result["error"]
    assert "max_failures" in message and "same command again" in message
    assert "worker 1 failed first" in message
    shutil.rmtree(run_dir)


def _begun(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "start"]


def test_two_of_two_workers_survive_the_deaths_of_their_nodes(
    runs: Runs, cluster: RayCluster, whole: Curve
) -> None:
    """A fixed number of workers: one node has a spare, for the next there is none yet."""
    cluster.add(cpus=1)
    command, run_dir = runs.start("nodes")
    wait_for(run_dir, reached(15), command)
    (spare,) = [node for node in cluster.nodes if not node.workers()]
    cluster.kill(_node_of_leader(cluster))
    wait_for(run_dir, lambda events: len(_begun(events)) == 2 and reached(60)(events), command)
    assert spare.workers(), "the spare node took the dead one's place"

    cluster.kill(_node_of_leader(cluster))
    cluster.add(cpus=1)
    ended = runs.commands.wait(command)
    assert ended.status == 0, ended.err
    assert ended.result["restarts"] == 2 and ended.result["workers"] == 2
    assert curve(run_dir) == whole
    _assert_little_lost(run_dir)


@pytest.mark.timeout(1500)
def test_an_elastic_run_goes_on_with_fewer_workers_and_grows_again(
    runs: Runs, cluster: RayCluster
) -> None:
    """[1, 2] workers: one node is drained and dies, another joins, one dies without notice."""
    # Until it is stopped; with so small a rate that rounding stays small.
    endless = {"max_steps": 1_000_000, "learning_rate": 1e-6}
    command, run_dir = runs.start("elastic", endless, workers=[1, 2])

    def begun_with(*workers: int) -> None:
        def seen(events: list[dict[str, Any]]) -> bool:
            found = [event["workers"] for event in _begun(events)]
            return found == list(workers) and events[-1]["event"] == "step"

        wait_for(run_dir, seen, command)

    wait_for(run_dir, reached(15), command)
    drained = _node_of_follower(cluster)
    cluster.drain(drained, 12)
    # The notice alone makes a checkpoint, at a step that `checkpoint.every` would not take.
    wait_for(run_dir, lambda events: any(e["step"] % 10 for e in _saved(events)), command)
    cluster.kill(drained)
    begun_with(2, 1)
    cluster.add(cpus=1)
    begun_with(2, 1, 2)
    cluster.kill(_node_of_leader(cluster))
    begun_with(2, 1, 2, 1)

    command.send_signal(signal.SIGINT)
    assert runs.commands.wait(command).status == 130
    (finish,) = [event for event in journal(run_dir) if event["event"] == "finish"]
    assert finish["restarts"] == 3
    _assert_little_lost(run_dir)
    enough = {**endless, "max_steps": curve(run_dir)[-1][0] + 10}
    command, _ = runs.start("elastic", enough, workers=[1, 2])
    ended = runs.commands.wait(command)
    assert ended.status == 0, ended.err
    assert runs.commands.call("finetune", runs.job("alone", enough), "--local").status == 0
    _assert_alike(curve(run_dir), curve(run_dir.parent / "alone"))


def _saved(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "checkpoint"]


def _node_of_leader(cluster: RayCluster) -> Node:
    (node,) = [n for n in cluster.nodes if any(map(_holds_journal, n.workers()))]
    return node


def _node_of_follower(cluster: RayCluster) -> Node:
    leading = _node_of_leader(cluster)
    (node,) = [n for n in cluster.nodes if n is not leading and n.workers()]
    return node
