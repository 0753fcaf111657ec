"""Sweeps on local Ray: tenants' curves are those of solo runs, whoever joins, leaves or dies."""

import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from tests.integration.cluster import RayCluster
from tests.integration.conftest import Commands, curve, journal, wait_until

# Ray and several engines start in each.
pytestmark = pytest.mark.timeout(1200)
JobFile = Callable[..., Path]
SPACE = {
    "lora.rank": {"choice": [2, 4, 8]},
    "training.learning_rate": {"loguniform": [1e-3, 1e-1]},
}
# At rates at which training is stable: a float's last digit stays the last digit.
POINTS = [
    {"lora.rank": 4, "training.learning_rate": 1e-2},
    {"lora.rank": 8, "training.learning_rate": 5e-3},
]


def _job(job_file: JobFile, name: str, steps: int = 12, **sweep: Any) -> Path:
    settings = {"trials": 4, "search_space": SPACE, "scheduler": "none", "concurrent": 2}
    return job_file(
        name,
        training={"max_steps": steps},
        evaluation={"every": 4, "samples": 0},
        checkpoint={"every": 3},
        cluster={"address": "local"},
        tracking={"registered_model": "swept"},
        sweep={**settings, **sweep},
    )


def _trials(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("trials/*/journal.jsonl"))


def _steps(folder: Path) -> int:
    """Steps that stand in all trials' journals."""
    return sum(len(curve(trial)) for trial in _trials(folder))


def _assert_equals_solo(commands: Commands, job: Path, trial: dict[str, Any], folder: Path) -> None:
    """A trial's curve is that of a fine-tune with its values."""
    name = f"solo-{trial['trial_id']}"
    settings = [f"--set={key}={value}" for key, value in trial["params"].items()]
    ended = commands.call("finetune", job, "--local", f"--set=name={name}", *settings)
    assert ended.status == 0, ended.err
    solo, own = curve(folder.parent / name), curve(folder / "trials" / trial["trial_id"])
    assert [step for step, *_ in own] == list(range(1, len(own) + 1))
    for left, right in zip(own, solo, strict=False):
        assert left == pytest.approx(right, rel=2e-3)


def test_trials_are_nested_runs_whose_curves_are_those_of_solo_runs(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    job, folder = _job(job_file, "search", points=POINTS), tmp_path / "runs" / "search"
    ended = commands.run("sweep", job, "--json")
    assert ended.status == 0, ended.err
    result = ended.result
    trials = {trial["trial_id"]: trial for trial in result["trials"]}
    assert len(trials) == 4 and {t["status"] for t in trials.values()} == {"finished"}
    assert {t["steps"] for t in trials.values()} == {12}
    tried = [trial["params"] for trial in trials.values()]
    assert all(point in tried for point in POINTS)
    best = min(trials.values(), key=lambda trial: trial["eval_loss"])
    assert result["best"]["trial_id"] == best["trial_id"]
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    nested = client.search_runs(
        [client.get_run(result["run_id"]).info.experiment_id],
        f"tags.mlflow.parentRunId = '{result['run_id']}'",
    )
    assert {run.info.run_id for run in nested} == {t["run_id"] for t in trials.values()}
    for run in nested:
        assert run.info.status == "FINISHED" and run.data.tags["state"] == "finished"
        assert len(client.get_metric_history(run.info.run_id, "loss")) == 12
    version = client.get_model_version_by_alias("swept", "champion")
    assert str(version.version) == result["model_version"] == "1"
    assert "proof.relative_error" in client.get_run(result["run_id"]).data.tags
    again = commands.run("sweep", job, "--json")
    assert again.status == 0 and again.result["trials"] == result["trials"]
    # Last, for these runs register adapters too; one may be better by a float's last digit.
    for trial in list(trials.values())[:2]:
        _assert_equals_solo(commands, job, trial, folder)
    accepted = commands.call("finetune", result["best"]["job"], "--local", "--json")
    assert accepted.status == 0, accepted.err
    assert accepted.result["eval_loss"] == pytest.approx(best["eval_loss"], rel=2e-3)


@pytest.mark.cluster
def test_a_killed_engine_a_killed_trial_and_a_killed_desk_change_nothing(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    calm = {"lora.rank": 4, "training.learning_rate": 3e-3}
    job = _job(job_file, "faults", steps=60, points=[calm])
    folder = tmp_path / "runs" / "faults"
    process = commands.start("sweep", job, "--json")
    wait_until(lambda: _steps(folder) > 20, "some steps were trained")
    _kill(process.pid, "RayTrainWorker")
    there = _steps(folder)
    wait_until(lambda: _steps(folder) > there + 10, "the engine went on")
    _kill(process.pid, "ResourceTrainable")
    there = _steps(folder)
    wait_until(lambda: _steps(folder) > there + 10, "the engine went on")
    _kill(process.pid, "Desk")
    ended = commands.wait(process)
    assert ended.status == 0, ended.err
    trials = ended.result["trials"]
    assert [trial["steps"] for trial in trials] == [60] * 4
    assert len(_trials(folder)) == 4
    (compared,) = (trial for trial in trials if trial["params"] == calm)
    _assert_equals_solo(commands, job, compared, folder)


@pytest.mark.cluster
def test_a_killed_sweep_goes_on_where_it_was(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    job, folder = _job(job_file, "again", steps=60), tmp_path / "runs" / "again"
    process = commands.start("sweep", job, "--json")
    wait_until(lambda: _finished(folder) >= 1, "a trial was finished")
    wait_until(lambda: _steps(folder) > 150, "the next trials were begun")
    _kill_all(process)
    whole = {trial.name for trial in _trials(folder) if _is_finished(trial)}
    ended = commands.run("sweep", job, "--json")
    assert ended.status == 0, ended.err
    steps = [t["steps"] for t in ended.result["trials"] if t["status"] == "finished"]
    assert steps == [60] * 4
    for trial in filter(_is_finished, _trials(folder)):
        starts = [event for event in journal(trial) if event["event"] == "start"]
        assert not (trial.name in whole and len(starts) > 1 and starts[-1]["resumed_from"] < 60)
        assert [step for step, *_ in curve(trial)] == list(range(1, 61))


@pytest.mark.cluster
def test_who_was_good_before_a_kill_is_remembered_after_it(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    """Successive halving: with empty rungs whoever comes first would be trained to the end."""
    rates = [1e-2, 1e-7, 1e-8]
    space = {"training.learning_rate": {"choice": rates}}
    points = [{"training.learning_rate": rate} for rate in rates]
    asha = {"scheduler": "asha", "search_space": space, "points": points, "concurrent": 1}
    job, folder = _job(job_file, "rungs", steps=24, trials=3, **asha), tmp_path / "runs" / "rungs"
    process = commands.start("sweep", job, "--json")
    wait_until(lambda: _finished(folder) == 1, "the first trial was finished")
    _kill_all(process)
    ended = commands.run("sweep", job, "--json")
    assert ended.status == 0, ended.err
    # One that Tune had not noted before the kill was proposed again.
    found = [trial for trial in ended.result["trials"] if trial["status"] != "interrupted"]
    assert {t["params"]["training.learning_rate"]: (t["status"], t["steps"]) for t in found} == {
        1e-2: ("finished", 24),
        **{rate: ("stopped", 4) for rate in rates[1:]},
    }


@pytest.mark.cluster
def test_trials_that_cannot_train_end_alone(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    space = {
        "lora.target_modules": {"choice": [["q_proj"], ["no_such_layer"]]},
        "training.learning_rate": {"choice": [1e-2, 1e38]},
    }
    job = _job(job_file, "partly", search_space=space, searcher="grid", trials=4)
    ended = commands.run("sweep", job, "--json")
    assert ended.status == 0, ended.err
    found = {
        (*trial["params"]["lora.target_modules"], trial["params"]["training.learning_rate"]): trial
        for trial in ended.result["trials"]
    }
    assert found["q_proj", 1e-2]["status"] == "finished"
    assert found["q_proj", 1e-2]["steps"] == 12
    assert found["q_proj", 1e38]["status"] == "failed"
    assert "loss of step" in found["q_proj", 1e38]["error"]
    for rate in (1e-2, 1e38):
        assert "no_such_layer" in found["no_such_layer", rate]["error"]


@pytest.mark.cluster
def test_what_belongs_to_the_data_is_searched_in_runs_of_their_own(
    commands: Commands, job_file: JobFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data's path is relative to where the command is given."""
    monkeypatch.chdir(tmp_path)
    space = {"data.train_on": {"choice": ["completion", "all"]}}
    job = _job(job_file, "apart", search_space=space, searcher="grid", trials=2)
    ended = commands.run("sweep", job, "--json", "--set=data.train=chats.jsonl")
    assert ended.status == 0, ended.err
    assert "a base of its own" in ended.err
    trials = ended.result["trials"]
    assert [trial["status"] for trial in trials] == ["finished"] * 2
    for trial in trials:
        _assert_equals_solo(commands, job, trial, tmp_path / "runs" / "apart")
    assert (tmp_path / "runs" / "apart" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.cluster
def test_an_engine_that_is_refused_its_data_is_its_trials_failure(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    space = {"data.format": {"choice": ["alpaca"]}}
    ended = commands.run("sweep", _job(job_file, "odd", search_space=space, trials=1), "--json")
    assert ended.status == 1 and "alpaca" in ended.result["error"]
    (trial,) = _trials(tmp_path / "runs" / "odd")
    (finish,) = [event for event in journal(trial) if event["event"] == "finish"]
    assert finish["status"] == "failed" and "alpaca" in finish["error"]


@pytest.mark.cluster
def test_twenty_trials_on_two_cores_most_of_them_stopped_early(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    job = _job(job_file, "many", trials=20, scheduler="asha", searcher="random", concurrent=4)
    ended = commands.run("sweep", job, "--json")
    assert ended.status == 0, ended.err
    trials = ended.result["trials"]
    states = [trial["status"] for trial in trials]
    assert len(states) == 20 and set(states) == {"finished", "stopped"}
    assert all(t["steps"] == 12 for t in trials if t["status"] == "finished")
    assert all(t["steps"] in (4, 8) for t in trials if t["status"] == "stopped")
    assert _most_at_once(tmp_path / "runs" / "many") == 4


@pytest.mark.cluster
def test_a_sweep_whose_time_is_up_ends_with_the_best_it_has(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    # Trials of two evaluations: even beside other work some come to their end.
    job = _job(job_file, "short", 8, trials=500, searcher="random", time_budget=60)
    ended = commands.run("sweep", job, "--json")
    assert ended.status == 0, ended.err
    trials = ended.result["trials"]
    # Whoever is beyond its first evaluation when the time is up still ends with its last.
    assert {trial["status"] for trial in trials} <= {"finished", "stopped"}
    finished = [trial for trial in trials if trial["status"] == "finished"]
    assert finished and len(trials) < 500 and len(trials) - len(finished) <= 2
    assert ended.result["best"]["eval_loss"] == min(trial["eval_loss"] for trial in finished)
    again = commands.run("sweep", job, "--json")
    assert again.status == 0 and again.result["trials"] == trials


@pytest.mark.cluster
def test_a_population_changes_its_learning_rates_on_the_way(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    space = {
        "training.learning_rate": {"loguniform": [1e-5, 1e-1]},
        "lora.rank": {"choice": [2, 4, 8]},
    }
    points = [
        {"training.learning_rate": rate, "lora.rank": rank}
        for rate, rank in ((1e-5, 2), (1e-4, 4), (1e-2, 8))
    ]
    job = _job(
        job_file,
        "population",
        40,
        search_space=space,
        points=points,
        trials=3,
        scheduler="pbt",
        concurrent="auto",
    )
    ended = commands.run("sweep", job, "--json")
    assert ended.status == 0, ended.err
    assert {trial["steps"] for trial in ended.result["trials"]} == {40}
    folders = _trials(tmp_path / "runs" / "population")
    rates = [{e["learning_rate"] for e in journal(f) if e["event"] == "step"} for f in folders]
    assert any(len(of_one) > 1 for of_one in rates)
    forked = [e for f in folders for e in journal(f) if e["event"] == "start"]
    assert any(event["resumed_from"] > 0 for event in forked)


@pytest.mark.cluster
def test_an_interrupted_sweep_goes_on_and_leaves_nothing_behind(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    cluster = RayCluster(tmp_path / "cluster")
    try:
        cluster.add(cpus=2)
        job, folder = _job(job_file, "stopped", steps=60), tmp_path / "runs" / "stopped"
        where = f"--set=cluster.address={cluster.address}"
        process = commands.start("sweep", job, where, "--json", **cluster.environment)
        wait_until(lambda: _steps(folder) > 40, "some steps were trained")
        process.send_signal(signal.SIGINT)
        ended = commands.wait(process)
        assert ended.status == 130, ended.err
        wait_until(lambda: not _left(cluster), f"nothing is left: {_left(cluster)}", 60, 0.5)
        ended = commands.run("sweep", job, where, "--json", **cluster.environment)
        assert ended.status == 0, ended.err
        assert [trial["steps"] for trial in ended.result["trials"]] == [60] * 4
        assert not _left(cluster)
    finally:
        cluster.close()


@pytest.mark.cluster
def test_a_sweep_looks_at_the_gpus_of_its_workers(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    """Here they are GPUs in Ray's books only: nothing is known of them, and the sweep goes on."""
    cluster = RayCluster(tmp_path / "cluster")
    try:
        cluster.add(cpus=2, gpus=1)
        where = f"--set=cluster.address={cluster.address}"
        job = _job(job_file, "looks", trials=2)
        ended = commands.run("sweep", job, where, "--json", **cluster.environment)
        assert ended.status == 0, ended.err
        assert "2 trials at a time share one base on 1 worker(s)" in ended.err
        assert [trial["steps"] for trial in ended.result["trials"]] == [12, 12]
        wait_until(lambda: not _left(cluster), f"nothing is left: {_left(cluster)}", 60, 0.5)
    finally:
        cluster.close()


@pytest.mark.cluster
def test_who_interrupts_twice_waits_for_nothing_and_goes_on_later(
    commands: Commands, job_file: JobFile, tmp_path: Path
) -> None:
    job, folder = _job(job_file, "twice", steps=60), tmp_path / "runs" / "twice"
    process = commands.start("sweep", job, "--json")
    wait_until(lambda: _steps(folder) > 20, "some steps were trained")
    family = psutil.Process(process.pid).children(recursive=True)
    # An engine that hears nothing would hold up whoever waits for it.
    engine, *_ = [p for p in family if "RayTrainWorker" in " ".join(p.cmdline())]
    engine.send_signal(signal.SIGSTOP)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    ended = commands.wait(process)
    with suppress(psutil.NoSuchProcess):
        engine.kill()
    assert ended.status == 130 and ended.result["status"] == "interrupted"
    assert not psutil.wait_procs(family, timeout=30)[1]
    ended = commands.run("sweep", job, "--json")
    assert ended.status == 0, ended.err
    assert [trial["steps"] for trial in ended.result["trials"]] == [60] * 4


@pytest.mark.parametrize(
    ("sweep", "word"),
    [
        ({"search_space": {}}, "search_space is empty"),
        ({"search_space": {"lora.rnak": {"choice": [1]}}}, "rank"),
        ({"search_space": {"lora.rank": {"choice": [-1]}}}, "lora.rank"),
        ({"search_space": {"lora.rank": {"uniform": [4, 8]}}}, "lora.rank"),
        (
            {"search_space": {"training.warmup_steps": {"int": [1, 50]}}},
            "training.warmup_steps",
        ),
        ({"metric": "accuracy"}, "metric"),
        ({"points": [{"lora.rank": 4}]}, "learning_rate"),
        ({"searcher": "grid"}, "is a range"),
        (
            {"search_space": {"model.base": {"choice": ["a", "b"]}}, "placement": "shared"},
            "sweep.placement",
        ),
    ],
)
def test_refused_before_any_work(
    commands: Commands, job_file: JobFile, tmp_path: Path, sweep: dict[str, Any], word: str
) -> None:
    ended = commands.call("sweep", _job(job_file, "bad", **sweep), "--json")
    assert ended.status == 2 and word in ended.err
    assert not (tmp_path / "runs" / "bad" / "trials").exists()


def _most_at_once(folder: Path) -> int:
    """Trials that were trained side by side."""
    changes = []
    for trial in _trials(folder):
        steps = [event["time"] for event in journal(trial) if event["event"] == "step"]
        changes += [(steps[0], 1), (steps[-1], -1)]
    counts, now = [], 0
    for _, change in sorted(changes):
        now += change
        counts.append(now)
    return max(counts)


def _left(cluster: RayCluster) -> list[str]:
    """Actors and placement groups that live on, but for the one with which Ray scales itself."""
    actors = [
        actor["class_name"]
        for state in ("ALIVE", "PENDING_CREATION", "RESTARTING")
        for actor in cluster.state("actors", state)
        if "AutoscalingCoordinator" not in actor["class_name"]
    ]
    groups = [
        str(group)
        for state in ("CREATED", "PENDING", "RESCHEDULING")
        for group in cluster.state("placement_groups", state)
    ]
    return actors + groups


def _finished(folder: Path) -> int:
    return sum(_is_finished(trial) for trial in _trials(folder))


def _is_finished(trial: Path) -> bool:
    return any(event.get("status") == "finished" for event in journal(trial))


def _kill_all(command: subprocess.Popen[str]) -> None:
    """The command and all that it started, at once."""
    for child in psutil.Process(command.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    command.kill()
    command.wait()


def _kill(command: int, kind: str) -> None:
    """Kill -9 one of the Ray processes that the command started."""
    running = {_title(p): p for p in psutil.Process(command).children(recursive=True)}
    found = [process for title, process in running.items() if title.startswith(f"ray::{kind}")]
    assert found, f"no {kind} is running; there are {sorted(running)}"
    found[0].kill()


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline()).strip()[:40]
