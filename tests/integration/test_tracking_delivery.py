"""Journals delivered to a real MLflow: SQLite, and a server that is killed and comes back."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orchestrator.config import DataConfig, JobConfig, ModelConfig, TrackingConfig, TrainingConfig
from orchestrator.jobfile import dump_job
from orchestrator.tracking.client import connect
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.delivery import Delivery, DeliveryReport, deliver_pending
from orchestrator.tracking.journal import Journal, journal_path
from orchestrator.tracking.registry import register
from orchestrator.tracking.secrets import redact
from orchestrator.tracking.store import tracking_uri
from tests.integration import conftest

SECONDS = 60
SECRET = "swordfish-0123456789"


def make_job(folder: Path, name: str = "bot", steps: int = 100, **tracking: Any) -> JobConfig:
    job = JobConfig(
        name=name,
        output_dir=str(folder / "runs"),
        model=ModelConfig(base="some/base"),
        data=DataConfig(train="train.jsonl"),
        training=TrainingConfig(max_steps=steps),
        tracking=TrackingConfig(**tracking),
    )
    job.run_dir.mkdir(parents=True, exist_ok=True)
    (job.run_dir / "job.yaml").write_text(redact(dump_job(job)))
    return job


def write_start(journal: Journal, **more: Any) -> None:
    journal.append(
        "start",
        resumed_from=journal.last_step,
        workers=1,
        device="cpu",
        base={"name": "some/base", "hash": "abc"},
        dataset={"name": "train.jsonl", "digest": "d" * 64, "train_examples": 9},
        environment={"python": "3.11", "torch": "2"},
        trainable_parameters=7,
        **more,
    )


def write_steps(journal: Journal, first: int, last: int) -> None:
    for step in range(first, last + 1):
        journal.append("step", step=step, loss=3 / step, learning_rate=1e-4, gradient_norm=0.1)


def write_end(journal: Journal, job: JobConfig, eval_loss: float | None) -> None:
    adapter = job.run_dir / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_model.safetensors").write_text(f"weights {eval_loss}")
    step, proof = journal.last_step, {"max_difference": 0.0}
    journal.append("adapter", step=step, path=str(adapter), eval_loss=eval_loss, proof=proof)
    journal.append("finish", status="finished")


def write_run(job: JobConfig, steps: int = 5, eval_loss: float | None = 2.0) -> None:
    with Journal(journal_path(job.run_dir)) as journal:
        write_start(journal)
        write_steps(journal, 1, steps)
        write_end(journal, job, eval_loss)


def deliver(job: JobConfig, said: list[str] | None = None) -> DeliveryReport:
    delivery = Delivery(job, job.run_dir, ([] if said is None else said).append)
    delivery.start()
    return delivery.close(SECONDS)


def client_of(job: JobConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri(job), registry_uri=tracking_uri(job))


def steps_in(client: MlflowClient, run_id: str | None, name: str = "loss") -> list[int]:
    return [m.step for m in client.get_metric_history(run_id, name)]


def runs_of(job: JobConfig) -> list[Any]:
    client = client_of(job)
    found = client.get_experiment_by_name(job.tracking.experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def wait_until(true: Callable[[], bool], what: str) -> None:
    conftest.wait_until(true, what, SECONDS, 0.1)


def test_everything_reaches_sqlite_once_however_often_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    job = make_job(tmp_path / "a folder", registered_model="bot")
    with Journal(journal_path(job.run_dir)) as journal:
        write_start(journal)
        about = {"index": 0, "prompt": "p", "reference": "r"}
        journal.append("sample", when="before", step=0, answer="x", **about)
        journal.append("evaluation", step=0, eval_loss=3.0, perplexity=20.1)
        # 8 GPUs give more metrics in one batch of events than MLflow takes at a time.
        gpus = {f"gpu_{n}_utilization_percentage": n for n in range(24)}
        for number in range(60):
            journal.append("system", **gpus, time=1000.0 + 10 * number)
            journal.append("step", step=number + 1, loss=float("nan") if number == 9 else 1.0)
        journal.append("sample", when="after", step=60, answer="y", **about)
        write_end(journal, job, 2.0)
    said: list[str] = []
    report = deliver(job, said)
    assert (report.pending, report.model_version, said) == (0, "1", [])

    # Everything again, as after a kill that lost the cursor and what it knew of uploads.
    Cursor(Cursor.load(job.run_dir).run_key).save(job.run_dir)
    again = deliver(job, said)
    assert again == report and said == []

    client, run_id = client_of(job), str(report.run_id)
    run = client.get_run(run_id)
    assert len(runs_of(job)) == 1 and run.info.status == "FINISHED"
    assert sorted(steps_in(client, run_id)) == [s for s in range(1, 61) if s != 10]
    assert run.data.tags["not_finite.loss"] == "nan at step 10"
    assert len(steps_in(client, run_id, "system/gpu_7_utilization_percentage")) == 60
    assert [m.value for m in client.get_metric_history(run_id, "eval_loss")] == [3.0]
    assert run.data.params["lora.rank"] == "16" and run.data.tags["base.hash"] == "abc"
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("train.jsonl", "d" * 36)
    # By this tag and in this layout the UI and `load_table` find tables; `load_table` itself
    # searches MLflow's global store, not the client's.
    shown = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "samples.json", "type": "table"}]
    table = pd.read_json(client.download_artifacts(run_id, "samples.json"), orient="split")
    assert table[["before", "after"]].values.tolist() == [["x", "y"]]
    assert {a.path for a in client.list_artifacts(run_id)} == {
        "adapter", "plots", "samples.json", "job.yaml", "environment.json",
    }  # fmt: skip
    (version,) = client.search_model_versions("name = 'bot'")
    assert version.tags["eval_loss"] == "2.0" and version.source.endswith("/adapter")
    assert str(client.get_model_version_by_alias("bot", "champion").version) == "1"
    events = [json.loads(line) for line in journal_path(job.run_dir).read_text().splitlines()]
    assert run.info.start_time == int(events[0]["time"] * 1000)
    assert run.info.end_time == int(events[-1]["time"] * 1000)
    assert list(here.iterdir()) == []


def test_a_resumed_run_is_the_same_run_and_the_same_version(tmp_path: Path) -> None:
    job = make_job(tmp_path, registered_model="bot")
    with Journal(journal_path(job.run_dir)) as journal:
        write_start(journal)
        write_steps(journal, 1, 3)
        journal.append("finish", status="failed", error="worker died")
    first = deliver(job)
    client, run_id = client_of(job), str(first.run_id)
    assert client.get_run(run_id).info.status == "FAILED"

    longer = make_job(tmp_path, steps=200, registered_model="bot")
    with Journal(journal_path(job.run_dir)) as journal:
        write_start(journal)
        write_steps(journal, 2, 5)
    deliver(longer)
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING" and run.data.params["training.max_steps"] == "100"
    assert run.data.tags["changed.training.max_steps"] == "200"
    for eval_loss in (2.5, 2.0):
        with Journal(journal_path(job.run_dir)) as journal:
            write_end(journal, job, eval_loss)
        assert deliver(longer).run_id == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    assert sorted(steps_in(client, run_id)) == [1, 2, 3, 4, 5]
    (version,) = client.search_model_versions("name = 'bot'")
    assert version.tags["eval_loss"] == "2.0"
    adapter = Path(client.download_artifacts(run_id, "adapter/adapter_model.safetensors"))
    assert adapter.read_text() == "weights 2.0"

    def champion_after(name: str, eval_loss: float | None) -> str:
        other = make_job(tmp_path, name, registered_model="bot")
        write_run(other, eval_loss=eval_loss)
        deliver(other)
        return str(client.get_model_version_by_alias("bot", "champion").version)

    assert [champion_after("equal", 2.0), champion_after("none", None)] == ["1", "1"]
    assert champion_after("better", 1.9) == "4"
    # Where none has the alias, the best of all gets it.
    client.delete_registered_model_alias("bot", "champion")
    assert champion_after("worse", 3.0) == "4"


KILLED_IN_CREATE = """
import os, signal, sys
from pathlib import Path
from mlflow import MlflowClient
from orchestrator.jobfile import load_job
from orchestrator.tracking.delivery import Delivery
create = MlflowClient.create_run
def killed(*args, **kwargs):
    create(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
MlflowClient.create_run = killed
job = load_job(sys.argv[1])
delivery = Delivery(job, job.run_dir, print)
delivery.start()
delivery.close(60)
"""


def test_a_kill_between_creating_and_saving_makes_no_second_run(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    write_run(job)
    command = [sys.executable, "-c", KILLED_IN_CREATE, str(job.run_dir / "job.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == -signal.SIGKILL
    # The first creation of the database, with all its migrations, said nothing on the terminal.
    assert (done.stdout, done.stderr) == ("", "")
    assert Cursor.load(job.run_dir).run_id is None
    (made,) = runs_of(job)
    report = deliver(job)
    assert (report.run_id, report.pending) == (made.info.run_id, 0)
    assert [run.info.run_id for run in runs_of(job)] == [report.run_id]
    assert len(steps_in(client_of(job), report.run_id)) == 5


def test_an_answer_that_is_lost_makes_no_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, calls = make_job(tmp_path), Counter[str]()
    write_run(job)

    def losing_once(name: str) -> None:
        whole = getattr(MlflowClient, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = whole(*args, **kwargs)
            calls[name] += 1
            if calls[name] == 1:
                raise ConnectionError("the answer was lost")
            return answer

        monkeypatch.setattr(MlflowClient, name, call)

    for name in ("create_run", "log_batch", "log_artifacts", "set_terminated"):
        losing_once(name)
    report = deliver(job)
    assert report.pending == 0 and calls["create_run"] == 1 and calls["set_terminated"] == 2
    assert len(runs_of(job)) == 1
    assert sorted(steps_in(client_of(job), report.run_id)) == [1, 2, 3, 4, 5]


def test_two_deliveries_at_once_make_one_run(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    write_run(job)
    both = [Delivery(job, job.run_dir, lambda line: None) for _ in range(2)]
    for delivery in both:
        delivery.start()
    # Closed in both orders: whoever has the lock keeps it until its own close.
    wait_until(lambda: any(delivery.run_id for delivery in both), "one has the run")
    waiting, delivering = sorted(both, key=lambda delivery: delivery.run_id is not None)
    reports = [delivery.close(SECONDS) for delivery in (waiting, delivering)]
    assert len(runs_of(job)) == 1 and {r.pending for r in reports} == {0}
    assert {r.run_id for r in reports} == {runs_of(job)[0].info.run_id}
    assert len(steps_in(client_of(job), reports[0].run_id)) == 5


def test_what_cannot_go_on_is_said_once(tmp_path: Path) -> None:
    job, said = make_job(tmp_path), list[str]()
    write_run(job)
    run_id = deliver(job).run_id
    client_of(job).delete_run(run_id)
    with Journal(journal_path(job.run_dir)) as journal:
        write_start(journal)
    report = deliver(job, said)
    assert report.pending == 1 and len(said) == 2
    assert "was deleted" in said[0] and "1 events" in said[1]
    with FileLock(job.run_dir / ".lock"):
        deliver_pending(make_job(tmp_path, "other"), tmp_path / "runs" / "other", said.append, 20)
    assert len(said) == 2, "a run that another command holds is left alone"


class Server:
    """An `mlflow server` on loopback that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.port = conftest.free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers"]
        command += ["1", "--port", str(self.port), "--artifacts-destination", "artifacts"]
        command += ["--backend-store-uri", "sqlite:///server.db"]
        with (self.folder / "log").open("ab") as log:
            # The server's job runner doubles the time it takes to start.
            environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        wait_until(self._answers, f"the server answers; see {self.folder / 'log'}")

    def kill(self) -> None:
        """End the server and its workers: the process group that `start` made."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            client = MlflowClient(f"http://127.0.0.1:{self.port}")
            return client.get_experiment("0") is not None
        except MlflowException:
            return False


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    made = Server(tmp_path / "server")
    yield made
    made.kill()


@pytest.mark.fault
def test_a_server_that_comes_and_goes_loses_and_doubles_nothing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_SECRET", SECRET)
    monkeypatch.setattr("orchestrator.tracking.delivery._LONGEST_PAUSE", 1.0)
    uri = f"http://ann:{SECRET}-too@127.0.0.1:{server.port}"
    job = make_job(tmp_path, uri=uri, registered_model="bot")
    said: list[str] = []
    delivery = Delivery(job, job.run_dir, said.append)
    delivery.start()
    with Journal(journal_path(job.run_dir)) as journal:
        began = time.monotonic()
        write_start(journal)
        journal.append("warning", message=f"logged in with {SECRET}")
        write_steps(journal, 1, 20)
        assert time.monotonic() - began < 1, "training never waits for MLflow"
        wait_until(lambda: len(said) == 1, "the user hears that the server is down")
        server.start()
        wait_until(lambda: len(said) == 2, "the user hears that it is back")
        assert "answer" in said[1]
        server.kill()
        write_steps(journal, 21, 40)
        wait_until(lambda: len(said) == 3, "the user hears that it is down again")
        server.start()
        wait_until(lambda: len(said) == 4, "the user hears that it is back again")
        server.kill()
        journal.append("evaluation", step=40, eval_loss=2.0, perplexity=7.4, note=f"{uri} {SECRET}")
        write_end(journal, job, 2.0)
        began = time.monotonic()
        report = delivery.close(3)
        assert time.monotonic() - began < 6
    assert report.run_id and report.pending == 3 and "3 events of bot wait" in said[-1]

    other = make_job(tmp_path, "other", uri=uri)
    write_run(other)
    began, heard = time.monotonic(), len(said)
    third = make_job(tmp_path, "third", uri=uri)
    deliver_pending(third, third.run_dir, said.append, SECONDS)
    assert time.monotonic() - began < 10, "a server that is away does not hold up a command"
    assert len(said) == heard + 2, "nor is the user told once for each run that waits"
    server.start()
    deliver_pending(third, third.run_dir, said.append, SECONDS)
    client = client_of(job)
    assert sorted(run.info.run_name for run in runs_of(job)) == ["bot", "other"]
    assert sorted(steps_in(client, report.run_id)) == list(range(1, 41))
    run = client.get_run(report.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["eval_loss"] == 2.0
    assert {"adapter", "plots"} <= {a.path for a in client.list_artifacts(report.run_id)}
    assert str(client.get_model_version_by_alias("bot", "champion").version) == "1"
    assert run.data.params["tracking.uri"] == f"http://***@127.0.0.1:{server.port}"
    server.kill()
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) > 10
    assert [p for p in written if SECRET.encode() in p.read_bytes()] == []
    assert not any(SECRET in line for line in said)


class _Overtaken:
    """A client in whose place another run does something before one of its calls."""

    def __init__(self, client: MlflowClient, before: int, other: Callable[[], Any]) -> None:
        self._client, self._before, self._other = client, before, other
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self._before:
                self._other()
            return getattr(self._client, name)(*arguments, **options)

        return call


def test_of_two_runs_that_register_at_once_the_better_is_champion(tmp_path: Path) -> None:
    client = connect(make_job(tmp_path))

    def run(name: str, eval_loss: float | None, place: Any = client) -> None:
        run_id = client.create_run("0").info.run_id
        register(place, name, run_id, eval_loss, {"loss": str(eval_loss)})

    cases = [(1.0, 1.5, [2.0]), (1.5, 1.0, [2.0]), (None, 1.0, [])]
    for own, others, earlier in cases:
        # The other does all of its registering before each call of this one in turn.
        for before in count(1):
            name = f"it's {own}, {others}, {earlier}, {before}"
            for loss in earlier:
                run(name, loss)
            overtaken = _Overtaken(client, before, partial(run, name, others))
            run(name, own, overtaken)
            if overtaken.calls < before:
                break
            found = client.get_model_version_by_alias(name, "champion").tags["loss"]
            assert found == str(min(own or 9.0, others)), name
        assert before > 5
