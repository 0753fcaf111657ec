"""Jobs submitted to a running head node, with the commands of the README: Ray's own Jobs API."""

import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import write_chats, write_job
from tests.integration.cluster import RAY, Node, RayCluster
from tests.integration.conftest import (
    Commands,
    Ended,
    curve,
    journal,
    reached,
    wait_for,
    wait_until,
)
from tests.unit.test_infra import OURS

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
STEPS = 400
SETTINGS: dict[str, Any] = {
    "data": {"train": "chats.jsonl"},
    "training": {"max_steps": STEPS, "batch_size": 7, "learning_rate": 1e-3},
    "evaluation": {"every": 1000, "samples": 0},
    "checkpoint": {"every": 1000},
    "cluster": {"workers": 2},
}
# What must not travel: named in .gitignore, or in jobs/runtime_env.yaml.
KEPT_BACK = (".env", "runs/old/adapter.bin", ".git/config")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    started = RayCluster(tmp_path_factory.mktemp("cluster"))
    try:
        started.add(cpus=1)
        started.add(cpus=1)
        yield started
    finally:
        started.close()


class Jobs:
    """A working directory as a fresh clone has it, and Ray's commands given in it."""

    def __init__(self, folder: Path, shared: Path, model: Path, cluster: RayCluster) -> None:
        self.folder, self.shared, self.cluster = folder, shared, cluster
        self._model = model
        self._started: list[subprocess.Popen[str]] = []
        for name in ("orchestrator", "jobs"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copy(ROOT / ".gitignore", folder)
        for name in KEPT_BACK:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("secret\n")
        write_chats(folder / "chats.jsonl", 60)

    def job(self, name: str, **sections: Any) -> str:
        """Write a job file in the working directory; its results go where all nodes reach."""
        settings = {**SETTINGS, "output_dir": str(self.shared), **sections}
        return write_job(self.folder, self._model, name, **settings).name

    def run(self, name: str) -> Path:
        return self.shared / name

    def ray(self, *arguments: str, **environment: str) -> Ended:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=240)
        return Ended(process.returncode, out, err)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        address = {"RAY_API_SERVER_ADDRESS": self.cluster.jobs_address}
        process = subprocess.Popen(
            [*RAY, "job", *arguments],
            cwd=self.folder,
            env={**os.environ, **self.cluster.environment, **address, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = ()) -> Ended:
        """As README.md says it."""
        sent = ("--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml")
        return self.ray("submit", *options, *sent, "--", "python", script, *arguments)

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def jobs(
    cluster: RayCluster, chat_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Jobs]:
    folder, shared = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("shared")
    made = Jobs(folder, shared, chat_model, cluster)
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(
    chat_model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[int, float, float]]:
    """The curve of the same job in one process."""
    folder = tmp_path_factory.mktemp("whole")
    write_chats(folder / "chats.jsonl", 60)
    data = {"train": str(folder / "chats.jsonl")}
    job = write_job(folder, chat_model, "whole", **{**SETTINGS, "data": data})
    assert Commands(cache).call("finetune", job, "--local").status == 0
    return curve(folder / "runs" / "whole")


def _assert_alike(found: list[Any], whole: list[Any]) -> None:
    """Equal but for rounding: two workers add the same numbers up in another order."""
    assert [step for step, *_ in found] == [step for step, *_ in whole]
    for (_, loss, norm), (_, other, other_norm) in zip(found, whole, strict=True):
        assert loss == pytest.approx(other, rel=1e-4)
        assert norm == pytest.approx(other_norm, rel=1e-3)


def _metrics(cluster: RayCluster) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Our metrics as Prometheus would scrape them now, by name."""
    discovery = cluster.head.session / "prom_metrics_service_discovery.json"
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for target in json.loads(discovery.read_text())[0]["targets"]:
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            # A node that starts is listed before it answers.
            continue
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_orchestrator"):
                    found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def _worker_lines(cluster: RayCluster, name: str) -> dict[Path, list[dict[str, Any]]]:
    """The structured lines of one run, by the worker's log they stand in."""
    found: dict[Path, list[dict[str, Any]]] = {}
    for path in [p for node in cluster.nodes for p in node.session.glob("logs/worker-*.out")]:
        for line in path.read_text().splitlines():
            if f'"run": "{name}"' in line:
                found.setdefault(path, []).append(json.loads(line))
    return found


def test_a_submitted_job_runs_from_a_clean_directory_and_is_seen_while_it_runs(
    jobs: Jobs, cluster: RayCluster, whole: list[tuple[int, float, float]]
) -> None:
    arguments = ("--no-wait", "--submission-id", "seen")
    submitted = jobs.submit("jobs/finetune.py", jobs.job("seen"), options=arguments)
    assert submitted.status == 0, submitted.err
    following = jobs.start("logs", "--follow", "seen")
    wait_for(jobs.run("seen"), reached(20), following)
    for node in cluster.nodes:
        (worker,) = node.workers()
        _assert_sent(node, worker)
    metrics: dict[str, list[tuple[dict[str, str], float]]] = {}

    def all_are_there() -> bool:
        metrics.update(_metrics(cluster))
        return set(metrics) >= OURS

    wait_until(all_are_there, "what the dashboard shows is exported", 60, 0.2)
    logs, _ = following.communicate(timeout=240)
    status = jobs.ray("status", "seen")
    assert "succeeded" in status.out + status.err
    _assert_alike(curve(jobs.run("seen")), whole)
    _assert_followed(logs)
    _assert_plausible(metrics, journal(jobs.run("seen")))
    _assert_logged_once(cluster, journal(jobs.run("seen")))


def _assert_sent(node: Node, worker: psutil.Process) -> None:
    """A worker finds first what was sent to its node, which holds what belongs there alone."""
    folder = Path(worker.environ()["PYTHONPATH"].split(":")[0])
    assert folder.is_relative_to(node.session) and "working_dir_files" in folder.parts
    assert (folder / "orchestrator/cluster/worker.py").exists()
    assert (folder / "chats.jsonl").exists()
    assert not any((folder / name).exists() for name in (*KEPT_BACK, ".git", "runs"))


def _assert_followed(logs: str) -> None:
    last = re.findall(rf"^step {STEPS}/{STEPS} .*", logs, re.MULTILINE)
    assert len(last) == 1, logs
    assert re.search(r"loss \d+\.\d+ .* \d+ tokens/s", last[0])
    assert logs.count("Quantizing") == 1, "a warning stands there once, not once per worker"


def _assert_plausible(
    metrics: dict[str, list[tuple[dict[str, str], float]]], events: list[dict[str, Any]]
) -> None:
    """One value of each metric, from the leader, within what the journal says of all steps."""
    steps = [event for event in events if event["event"] == "step"]
    for name, field in {
        "ray_orchestrator_step": "step",
        "ray_orchestrator_loss": "loss",
        "ray_orchestrator_tokens_per_second": "tokens_per_second",
        "ray_orchestrator_step_seconds": "seconds",
        "ray_orchestrator_collective_seconds": "collective_seconds",
    }.items():
        ((labels, value),) = metrics[name]
        assert labels["run"] == "seen"
        assert any(value == pytest.approx(step[field]) for step in steps), name
    ((_, restarts),) = metrics["ray_orchestrator_restarts"]
    assert restarts == 0
    ((_, seconds),) = metrics["ray_orchestrator_step_seconds"]
    ((_, waited),) = metrics["ray_orchestrator_collective_seconds"]
    assert 0 < waited < seconds


def _assert_logged_once(cluster: RayCluster, events: list[dict[str, Any]]) -> None:
    """One worker logs, a line for each step, with the journal's numbers."""
    ((_, lines),) = _worker_lines(cluster, "seen").items()
    fields = ("step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds")
    expected = [{key: e[key] for key in fields} for e in events if e["event"] == "step"]
    logged = [{k: v for k, v in line.items() if k != "run"} for line in lines if "step" in line]
    assert logged == expected
    warnings = [line["warning"] for line in lines if "warning" in line]
    assert warnings == [e["message"] for e in events if e["event"] == "warning"]
    assert len(warnings) == len(set(warnings)) > 0


def test_a_stopped_job_saves_and_goes_on_when_it_is_submitted_again(
    jobs: Jobs, whole: list[tuple[int, float, float]]
) -> None:
    job, run_dir = jobs.job("stopped"), jobs.run("stopped")
    arguments = ("--no-wait", "--submission-id", "stopped")
    assert jobs.submit("jobs/finetune.py", job, options=arguments).status == 0
    wait_for(run_dir, reached(15), jobs.start("logs", "--follow", "stopped"))
    stopped = jobs.ray("stop", "stopped")
    assert stopped.status == 0 and "was stopped" in stopped.out + stopped.err
    events = journal(run_dir)
    last = max(event["step"] for event in events if event["event"] == "step")
    assert 15 <= last < STEPS, "checkpoint.every alone would save none by now"
    assert [e["step"] for e in events if e["event"] == "checkpoint"][-1] == last
    assert events[-1]["event"] == "finish" and events[-1]["status"] == "interrupted"

    again = jobs.submit("jobs/finetune.py", job, "--json")
    assert again.status == 0, again.out + again.err
    events = journal(run_dir)
    assert [e["resumed_from"] for e in events if e["event"] == "start"] == [0, last]
    _assert_alike(curve(run_dir), whole)
    # Its one JSON object stands in the job's log too.
    assert '"status": "finished", "name": "stopped"' in again.out


def test_a_job_that_waits_for_another_is_stopped_at_once(jobs: Jobs) -> None:
    taken = ("--no-wait", "--submission-id", "taken", "--entrypoint-num-cpus", "1")
    assert jobs.ray("submit", *taken, "--", "sleep", "600").status == 0
    options = ("--no-wait", "--submission-id", "waiting")
    assert jobs.submit("jobs/finetune.py", jobs.job("waiting"), options=options).status == 0
    following = jobs.start("logs", "--follow", "waiting")
    assert following.stdout is not None
    said = next(line for line in following.stdout if line.startswith("Waiting for"))
    assert said.startswith("Waiting for 1 more CPUs: the cluster has 2 CPUs")
    stopped = jobs.ray("stop", "waiting")
    assert "was stopped" in stopped.out + stopped.err
    (event,) = journal(jobs.run("waiting"))
    assert event["event"] == "finish" and event["status"] == "interrupted"
    # Not killed, which would have said nothing.
    assert "same command again" in following.communicate()[0]
    assert jobs.ray("stop", "taken").status == 0


def test_a_sweep_is_submitted_in_the_same_way(jobs: Jobs) -> None:
    job = jobs.job(
        "swept",
        training={"max_steps": 8, "batch_size": 4},
        evaluation={"every": 4, "samples": 0},
        sweep={"trials": 2, "search_space": {"lora.rank": {"grid": [2, 4]}}, "searcher": "grid"},
    )
    done = jobs.submit("jobs/sweep.py", job)
    assert done.status == 0, done.out + done.err
    for trial in jobs.run("swept").glob("trials/*"):
        # Of each trial too whoever watches Ray sees every step.
        ((_, lines),) = _worker_lines(jobs.cluster, f"swept/{trial.name}").items()
        logged = [line["step"] for line in lines if "step" in line]
        assert logged == [step for step, *_ in curve(trial)]
    result = json.loads((jobs.run("swept") / "result.json").read_text())
    assert {trial["params"]["lora.rank"] for trial in result["trials"]} == {2, 4}
    assert Path(result["adapter"], "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "settings", "status", "said"),
    [
        ("refused", ["--set", "lora.rnak=8"], 2, "did you mean lora.rank"),
        # Ray deletes what was sent when the job is over, and the adapter with it.
        ("lost", ["--set", "output_dir=runs"], 2, "output_dir"),
        ("failed", ["--set", "training.learning_rate=1e30"], 1, "learning_rate"),
    ],
)
def test_the_exit_status_reaches_rays_status(
    jobs: Jobs, name: str, settings: list[str], status: int, said: str
) -> None:
    arguments = (jobs.job(name), *settings)
    done = jobs.submit("jobs/finetune.py", *arguments, options=("--submission-id", name))
    assert done.status == 1
    answer = jobs.ray("status", name)
    text = answer.out + answer.err
    assert f"failed with exit code {status}," in text
    assert said in text


def test_without_the_token_nobody_submits(jobs: Jobs) -> None:
    arguments = ("submit", "--no-wait", "--", "python", "-c", "pass")
    done = jobs.ray(*arguments, RAY_AUTH_TOKEN="0" * 32)
    assert done.status != 0
    assert "authentication token is invalid" in (done.out + done.err).lower()
