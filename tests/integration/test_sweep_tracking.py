"""A sweep in real MLflow: nested runs, the best trial, the table, the pictures, the page."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from orchestrator.config import JobConfig
from orchestrator.jobfile import dump_job
from orchestrator.sweep.finish import conclude, settle
from orchestrator.sweep.space import trial_job
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.delivery import Delivery, deliver_pending
from orchestrator.tracking.earlier import in_store
from orchestrator.tracking.observer import JournalObserver
from orchestrator.tracking.store import tracking_uri
from orchestrator.tracking.trials import TrialDeliveries
from tests.integration.conftest import SECONDS, free_port, wait_until
from tests.unit.sweeps import Trained, sweep_job, write_trials

TRIALS = [
    Trained({"lora.rank": 4, "training.learning_rate": 1e-3}, [4, 3, 3, 2, 2, 1.5]),
    Trained({"lora.rank": 8, "training.learning_rate": 1e-2}, [4, 3.5], "stopped"),
    Trained({"lora.rank": 16, "training.learning_rate": 2e-3}, [4, 3, 2, 2, 2, 1.2]),
    Trained({"lora.rank": 32, "training.learning_rate": 5e-3}, [4, 9], "failed", "it is nan"),
    Trained({"lora.rank": 4, "training.learning_rate": 4e-3}, [4, 3], None),
    Trained({"lora.rank": 8, "training.learning_rate": 3e-3}, joined=False),
]


def _deliver(job: JobConfig, end: Callable[[Delivery], str]) -> MlflowClient:
    """Deliver the sweep as its command does; `end` ends it and returns its status."""
    said: list[str] = []
    delivery = Delivery(job, job.run_dir, said.append)
    trials = TrialDeliveries(job, job.run_dir, said.append)
    with JournalObserver(job.run_dir) as observer:
        observer.emit("places", places=2)
    delivery.start()
    trials.start()
    status = end(delivery)
    with JournalObserver(job.run_dir) as observer:
        observer.emit("finish", status=status, error=None, seconds=9.5)
    assert delivery.close(SECONDS).pending == 0
    trials.close(SECONDS)
    assert said == []
    return MlflowClient(f"sqlite:///{job.output_dir}/mlflow.db")


def _finish(job: JobConfig) -> Callable[[Delivery], str]:
    def end(delivery: Delivery) -> str:
        with JournalObserver(job.run_dir) as observer:
            conclude(
                job, job.run_dir, {}, observer, lambda: delivery.catch_up(SECONDS).model_version
            )
        return "finished"

    return end


def _interrupt(job: JobConfig) -> Callable[[Delivery], str]:
    def end(delivery: Delivery) -> str:
        settle(job.run_dir, "interrupted")
        return "interrupted"

    return end


def _sweep(tmp_path: Path, trials: list[Trained]) -> JobConfig:
    job = sweep_job(tmp_path)
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "job.yaml").write_text(dump_job(job))
    for folder in write_trials(job, trials).iterdir():
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text("{}")
    return job


def _runs(client: MlflowClient) -> tuple[Run, dict[str, Run]]:
    """The sweep's run, and its trials' by name."""
    experiment = client.get_experiment_by_name("default")
    runs = client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    nested = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id}
    return parent, {run.info.run_name: run for run in nested}


def test_each_trial_is_a_run_with_its_values_state_and_cost(tmp_path: Path) -> None:
    job = _sweep(tmp_path, TRIALS)
    _, nested = _runs(_deliver(job, _finish(job)))
    found = [nested[f"abc_{number:05d}"] for number in range(len(TRIALS))]
    states = ["finished", "stopped", "finished", "failed", "stopped", "stopped"]
    assert [run.data.tags["state"] for run in found] == states
    ended = ["FINISHED", "FINISHED", "FINISHED", "FAILED", "FINISHED", "FINISHED"]
    assert [run.info.status for run in found] == ended
    for run, trial in zip(found, TRIALS, strict=True):
        assert {k: float(run.data.params[k]) for k in trial.params} == trial.params
        metrics, steps = run.data.metrics, len(trial.losses)
        assert metrics["total_steps"] == steps and metrics["total_tokens"] == 100 * steps
        assert metrics["total_seconds"] == 0.5 * steps
    assert found[3].data.tags["error"] == "it is nan"
    assert "eval_loss" not in found[5].data.metrics


def test_runs_can_be_sorted_by_what_they_cost(tmp_path: Path) -> None:
    job = _sweep(tmp_path, TRIALS)
    client = _deliver(job, _finish(job))
    parent, _ = _runs(client)
    nested = client.search_runs(
        [parent.info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent.info.run_id}'",
        order_by=["metrics.total_tokens ASC"],
    )
    assert [run.data.metrics["total_tokens"] for run in nested] == [0, 200, 200, 200, 600, 600]


def test_the_sweeps_run_holds_the_best_and_the_report(tmp_path: Path) -> None:
    job = _sweep(tmp_path, TRIALS)
    client = _deliver(job, _finish(job))
    parent, _ = _runs(client)
    run, metrics = parent.info.run_id, parent.data.metrics
    assert parent.info.status == "FINISHED" and parent.data.tags["state"] == "finished"
    assert parent.data.tags["best.trial_id"] == "abc_00002"
    assert parent.data.params["best.lora.rank"] == "16"
    assert parent.data.params["sweep.trials"] == "16"
    assert (metrics["best.eval_loss"], metrics["best.steps"]) == (1.2, 6)
    counts = {state: metrics[f"trials.{state}"] for state in ("finished", "stopped", "failed")}
    assert counts == {"finished": 2, "stopped": 3, "failed": 1}
    assert (metrics["total_tokens"], metrics["total_seconds"]) == (1800, 9.5)
    files = {Path(file.path).name for file in client.list_artifacts(run, "report")}
    pictures = {"loss_curves", "eval_loss_over_learning_rate", "parallel_coordinates", "importance"}
    assert files == {"report.html", "trials.json", "best.yaml", *(f"{n}.png" for n in pictures)}
    page = Path(client.download_artifacts(run, "report/report.html", str(tmp_path))).read_text()
    version = client.get_model_version_by_alias("searched", "champion")
    assert version.run_id == run and f"searched, version {version.version}" in page


def test_the_trials_are_an_mlflow_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _sweep(tmp_path, TRIALS)
    client = _deliver(job, _finish(job))
    parent, _ = _runs(client)
    shown = json.loads(parent.data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "report/trials.json", "type": "table"}]
    run = parent.info
    # It looks for the run in the process's own store, whatever the client's.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{job.output_dir}/mlflow.db")
    table: Any = client.load_table(run.experiment_id, "report/trials.json", [run.run_id])
    assert list(table["trial_id"][:2]) == ["abc_00002", "abc_00000"]
    assert list(table["lora.rank"][:2]) == [16, 4]


def test_an_interrupted_sweeps_trials_are_killed_and_run_again(tmp_path: Path) -> None:
    job = _sweep(tmp_path, TRIALS)

    client = _deliver(job, _interrupt(job))
    parent, nested = _runs(client)
    assert parent.info.status == nested["abc_00004"].info.status == "KILLED"
    assert nested["abc_00004"].data.tags["state"] == "interrupted"
    with JournalObserver(job.run_dir / "trials" / "abc_00004") as observer:
        observer.emit("start", resumed_from=2, total_steps=6)
    trials = TrialDeliveries(job, job.run_dir, print)
    trials.start()
    trials.close(SECONDS)
    _, nested = _runs(client)
    assert nested["abc_00004"].info.status == "RUNNING"
    assert nested["abc_00004"].data.tags["state"] == "running"


def test_deliveries_of_ended_trials_let_their_threads_go(tmp_path: Path) -> None:
    job = _sweep(tmp_path, TRIALS[:4])

    def wait(delivery: Delivery) -> str:
        def busy() -> int:
            return sum(thread.name == "mlflow-delivery" for thread in threading.enumerate())

        wait_until(lambda: delivery.run_id is not None, "the sweep has its run")
        wait_until(lambda: busy() > 1, "trials are delivered")
        wait_until(lambda: busy() == 1, "only the sweep's own delivery is left")
        return "failed"

    parent, nested = _runs(_deliver(job, wait))
    assert parent.info.status == "FAILED" and len(nested) == 4


def test_trials_that_wait_for_mlflow_are_delivered_by_the_next_command(tmp_path: Path) -> None:
    job, said = _sweep(tmp_path, TRIALS[:4]), list[str]()
    settle(job.run_dir, "interrupted")
    with JournalObserver(job.run_dir) as observer:
        observer.emit("finish", status="failed", error="MLflow was away", seconds=1.0)
    other = Path(job.output_dir) / "other"
    deliver_pending(job.model_copy(update={"name": "other"}), other, said.append, 120)
    parent, nested = _runs(MlflowClient(f"sqlite:///{job.output_dir}/mlflow.db"))
    assert parent.info.run_name == "search" and said == []
    states = ["FINISHED", "FINISHED", "FINISHED", "FAILED"]
    assert [nested[f"abc_{number:05d}"].info.status for number in range(4)] == states


def test_a_sweep_that_goes_on_in_another_store_has_all_its_trials_there(tmp_path: Path) -> None:
    job = _sweep(tmp_path, TRIALS)
    _deliver(job, _interrupt(job))
    moved = in_store(job, f"sqlite:///{tmp_path / 'other.db'}")
    _deliver(moved, _finish(moved))
    parent, nested = _runs(MlflowClient(tracking_uri(moved)))
    assert parent.info.artifact_uri.startswith((tmp_path / "mlartifacts").as_uri())
    assert {name: run.data.tags["state"] for name, run in nested.items()} == {
        **{f"abc_{number:05d}": "finished" for number in (0, 2)},
        **{f"abc_{number:05d}": "interrupted" for number in (4, 5)},
        **{"abc_00001": "stopped", "abc_00003": "failed"},
    }


def test_a_trial_that_becomes_another_one_shows_its_new_values(tmp_path: Path) -> None:
    """Population based training: the parameters of its run stay, and a tag says what changed."""
    job = _sweep(tmp_path, TRIALS[:1])
    folder = job.run_dir / "trials" / "abc_00000"

    def become(delivery: Delivery) -> str:
        wait_until(lambda: Cursor.peek(folder) is not None, "the trial's delivery has begun")
        params = {**TRIALS[0].params, "training.learning_rate": 3e-3}
        other = trial_job(job, folder.name, folder.parent, params, tracking_uri(job))
        (folder / "job.yaml").write_text(dump_job(other))
        with JournalObserver(folder) as observer:
            observer.emit("start", resumed_from=4, total_steps=6)
            observer.emit("finish", status="stopped", error=None)
        return "stopped"

    _, nested = _runs(_deliver(job, become))
    data = nested["abc_00000"].data
    assert data.tags["changed.training.learning_rate"] == "0.003"
    assert data.params["lora.rank"] == "4" and "changed.lora.rank" not in data.tags


def test_that_mlflow_is_away_is_said_once_for_a_whole_sweep(tmp_path: Path) -> None:
    job = in_store(_sweep(tmp_path, TRIALS), f"http://127.0.0.1:{free_port()}")
    said: list[str] = []
    delivery = Delivery(job, job.run_dir, said.append)
    trials = TrialDeliveries(job, job.run_dir, said.append)
    with JournalObserver(job.run_dir) as observer:
        observer.emit("places", places=2)
    # As of a command before, for which MLflow was there.
    replace(Cursor.load(job.run_dir), run_id="a", store=tracking_uri(job)).save(job.run_dir)
    delivery.start()
    trials.start()
    wait_until(lambda: delivery.away, "the user is told")
    delivery.close(1.0)
    trials.close(1.0)
    assert [("goes on" in line, "wait in" in line) for line in said] == [
        (True, False),
        (False, True),
        (False, True),
    ]
