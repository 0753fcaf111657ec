"""The same job through Ray Train on local Ray: same curve, and a worker that dies."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ray._private.services import find_bootstrap_address

from tests.integration.conftest import Commands, curve, journal, reached, wait_for

JobFile = Callable[..., Path]
# A cluster of its own, whatever else runs on this machine.
OWN = {"address": "local"}
# Two workers, of which one dies as it unpacks what it is to do.
HANDED = """
import os, signal, sys
from pathlib import Path
from orchestrator.cluster.driver import run_workers
from orchestrator.cluster.plan import plan_workers
from orchestrator.cluster.session import session
from orchestrator.jobfile import load_job

class Deadly:
    def __init__(self, marker):
        self.marker = marker
    def __reduce__(self):
        return unpack, (self.marker,)

def unpack(marker):
    if b"run_train_fn" in Path("/proc/self/cmdline").read_bytes():
        try:
            Path(marker).touch(exist_ok=False)
        except FileExistsError:
            return marker
        os.kill(os.getpid(), signal.SIGKILL)
    return marker

def work(config):
    return {"worked": True}

job = load_job(sys.argv[1])
job.run_dir.mkdir(parents=True)
with session("local", print) as here:
    plan = plan_workers(job.cluster, here.nodes, here.most, here.own)
    more = {"controls": True, "deadly": Deadly(sys.argv[2])}
    print(run_workers(job, job.run_dir, plan, here, print, work, more))
"""


@pytest.fixture
def whole(commands: Commands, job_file: JobFile, tmp_path: Path) -> list[tuple[int, float, float]]:
    job = job_file("whole", training={"max_steps": 40})
    assert commands.call("finetune", job, "--local").status == 0
    return curve(tmp_path / "runs" / "whole")


@pytest.mark.fault
def test_a_killed_worker_comes_back_and_the_curve_is_the_same(
    commands: Commands, job_file: JobFile, tmp_path: Path, whole: list[tuple[int, float, float]]
) -> None:
    job = job_file("ray", training={"max_steps": 40}, cluster=OWN)
    run_dir = tmp_path / "runs" / "ray"
    announced = find_bootstrap_address(None)
    process = commands.start("finetune", job, "--json")
    wait_for(run_dir, reached(5), process)
    # Another command's `auto` finds no cluster in this one's Ray.
    assert find_bootstrap_address(None) == announced
    beside = {"TrainController", "SynchronizationActor", "log_monitor"}
    assert not any(name in title for name in beside for title in _titles(process.pid))
    worker = _worker(process.pid)
    assert "glibc.malloc.tcache_count=0" in worker.environ()["GLIBC_TUNABLES"]
    assert _interrupting(process.pid) == {worker.pid, worker.ppid()}
    threads = Path(f"/proc/{worker.pid}/task").glob("*/comm")
    assert not any("gloo" in path.read_text() for path in threads), "it has nobody to meet"
    worker.kill()
    ended = commands.wait(process)
    assert ended.status == 0, ended.err
    assert ended.result["restarts"] == 1 and ended.result["workers"] == 1
    assert curve(run_dir) == whole
    assert len([e for e in journal(run_dir) if e["event"] == "start"]) == 2


@pytest.mark.fault
def test_ctrl_c_saves_and_the_same_command_goes_on_until_workers_fail_too_often(
    commands: Commands, job_file: JobFile, tmp_path: Path, whole: list[tuple[int, float, float]]
) -> None:
    job = job_file("ray", training={"max_steps": 40}, cluster={**OWN, "max_failures": 0})
    run_dir = tmp_path / "runs" / "ray"
    process = commands.start("finetune", job, "--json")
    wait_for(run_dir, reached(3), process)
    process.send_signal(signal.SIGINT)
    ended = commands.wait(process)
    assert ended.status == 130 and "Run the same command again" in ended.err
    stopped = len(curve(run_dir))
    process = commands.start("finetune", job, "--json")
    wait_for(run_dir, reached(stopped + 2), process)
    _worker(process.pid).kill()
    ended = commands.wait(process)
    assert ended.status == 1
    assert "cluster.max_failures is 0" in ended.result["error"]
    found = curve(run_dir)
    assert found == whole[: len(found)]


@pytest.mark.fault
def test_a_worker_that_dies_as_it_is_handed_its_work_is_no_failure(
    job_file: JobFile, tmp_path: Path
) -> None:
    job = job_file("handed", cluster={"workers": 2, "cpus_per_worker": 0.5, "max_failures": 0})
    marker = tmp_path / "died"
    done = subprocess.run(
        [sys.executable, "-c", HANDED, str(job), str(marker)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert marker.exists() and "{'worked': True}" in done.stdout


def test_an_error_the_user_can_mend_is_not_tried_again(
    commands: Commands, job_file: JobFile
) -> None:
    job = job_file(lora={"target_modules": ["qproj"]}, cluster=OWN)
    ended = commands.run("finetune", job, "--json")
    assert ended.status == 2 and "q_proj" in ended.err
    assert ended.result["status"] == "refused"


def _interrupting(command: int) -> set[int]:
    """Of the processes that the command started, those with a thread of normal priority."""
    found = set()
    for process in psutil.Process(command).children(recursive=True):
        threads = [os.getpriority(os.PRIO_PROCESS, thread.id) for thread in process.threads()]
        if min(threads) < 19:
            found.add(process.pid)
    return found


def _titles(command: int) -> list[str]:
    """What the processes are called that the command started."""
    started = psutil.Process(command).children(recursive=True)
    return [" ".join(process.cmdline()) for process in started]


def _worker(command: int) -> psutil.Process:
    """The training worker among the processes that the command started."""
    for process in psutil.Process(command).children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            return process
    raise AssertionError("no training worker is running")
