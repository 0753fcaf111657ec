"""Events become an MLflow run. Every call may be repeated."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException

from orchestrator.config import JobConfig
from orchestrator.places import journal_path
from orchestrator.tracking import registry, report
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.journal import read_events
from orchestrator.tracking.secrets import redact
from orchestrator.tracking.store import artifact_location, tracking_uri

_KEY_TAG = "orchestrator.run_key"
_VALUE_LIMIT = 500
_STATUSES = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_METRICS = {
    "step": (
        "loss",
        "learning_rate",
        "gradient_norm",
        "tokens",
        "target_tokens",
        "tokens_per_second",
        "seconds",
        "memory_bytes",
    ),
    "evaluation": ("eval_loss", "perplexity"),
}
# MLflow repeats a failed request seven times over four minutes; the journal makes that needless.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def connect(job: JobConfig) -> MlflowClient:
    """A client of the job's store; what the user set in the environment stays."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    uri = tracking_uri(job)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class MlflowRun:
    """One run's place in MLflow."""

    def __init__(self, client: MlflowClient, job: JobConfig, run_dir: Path, cursor: Cursor) -> None:
        self._client, self._job, self._run_dir, self._cursor = client, job, run_dir, cursor

    def replay(self, events: Sequence[dict[str, Any]]) -> Cursor:
        """Deliver events in order; returns the cursor with what was learnt on the way."""
        run_id = self._run_id()
        metrics = [metric for event in events for metric in _metrics(event)]
        if metrics:
            self._client.log_batch(run_id, metrics=metrics, synchronous=True)
        for event in events:
            handler = getattr(self, f"_on_{event['event']}", None)
            if handler is not None:
                handler(run_id, event)
        return self._cursor

    def _run_id(self) -> str:
        if self._cursor.run_id is None:
            found = self._find() or self._create()
            self._cursor = replace(self._cursor, run_id=found)
            self._cursor.save(self._run_dir)
        return str(self._cursor.run_id)

    def _find(self) -> str | None:
        """A run that was created just before a kill."""
        experiment = self._client.get_experiment_by_name(self._job.tracking.experiment)
        if experiment is None:
            return None
        runs = self._client.search_runs(
            [experiment.experiment_id], f"tags.`{_KEY_TAG}` = '{self._cursor.run_key}'"
        )
        return runs[0].info.run_id if runs else None

    def _create(self) -> str:
        experiment = self._experiment_id()
        tags = {_KEY_TAG: self._cursor.run_key, "orchestrator.name": self._job.name}
        run = self._client.create_run(experiment, tags=tags, run_name=self._job.name)
        return run.info.run_id

    def _experiment_id(self) -> str:
        name = self._job.tracking.experiment
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        try:
            return self._client.create_experiment(name, artifact_location(self._job))
        except MlflowException:
            # Another run made it in the meantime.
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    def _on_start(self, run_id: str, event: Mapping[str, Any]) -> None:
        self._client.update_run(run_id, status="RUNNING")
        self._log_params(run_id)
        base, environment = event["base"], event["environment"]
        tags = {
            "base.name": base["name"],
            "base.hash": base["hash"],
            "device": event["device"],
            "workers": event["workers"],
            "trainable_parameters": event["trainable_parameters"],
            **{f"environment.{name}": value for name, value in environment.items()},
        }
        self._client.log_batch(
            run_id, tags=[RunTag(k, redact(str(v))[:_VALUE_LIMIT]) for k, v in tags.items()]
        )
        dataset = event["dataset"]
        source = json.dumps({"name": redact(dataset["name"])})
        entity = Dataset(
            Path(redact(dataset["name"])).name,
            dataset["digest"],
            "local",
            source,
            profile=json.dumps({k: v for k, v in dataset.items() if k.endswith("examples")}),
        )
        self._client.log_inputs(
            run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])]
        )
        self._client.log_dict(run_id, dict(environment), "environment.json")
        if (self._run_dir / "job.yaml").exists():
            self._client.log_artifact(run_id, str(self._run_dir / "job.yaml"))

    def _log_params(self, run_id: str) -> None:
        """The whole job file; a value that changed since the run began becomes a tag."""
        wanted = dict(_flat(self._job.model_dump(mode="json")))
        there = self._client.get_run(run_id).data.params
        fresh = [Param(key, value) for key, value in wanted.items() if key not in there]
        for start in range(0, len(fresh), 100):
            self._client.log_batch(run_id, params=fresh[start : start + 100])
        for key, value in wanted.items():
            if key in there and there[key] != value:
                self._client.set_tag(run_id, f"changed.{key}", value)

    def _on_adapter(self, run_id: str, event: Mapping[str, Any]) -> None:
        folder = Path(event["path"])
        if not folder.is_dir():
            return
        self._client.log_artifacts(run_id, str(folder), "adapter")
        proof = {f"proof.{name}": str(value) for name, value in event["proof"].items()}
        self._client.log_batch(run_id, tags=[RunTag(k, v) for k, v in proof.items()])
        name = self._job.tracking.registered_model
        if name is not None:
            version = registry.register(
                self._client, name, run_id, event.get("eval_loss"), event["step"], self._job
            )
            self._cursor = replace(self._cursor, model_version=version)

    def _on_finish(self, run_id: str, event: Mapping[str, Any]) -> None:
        events = [e for e, _ in read_events(journal_path(self._run_dir))]
        figure = report.loss_curve(events, self._job.name)
        if figure is not None:
            self._client.log_figure(run_id, figure, "plots/loss.png")
        table = report.sample_table(events)
        if table is not None:
            self._client.log_dict(run_id, table, "samples.json")
            note = [{"path": "samples.json", "type": "table"}]
            self._client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(note))
        if event.get("error"):
            self._client.set_tag(run_id, "error", redact(str(event["error"]))[:5000])
        self._client.set_terminated(run_id, _STATUSES[event["status"]])


def _metrics(event: Mapping[str, Any]) -> Iterator[Metric]:
    kind, moment = event["event"], int(event.get("time", 0) * 1000)
    if kind == "system":
        for name, value in event.items():
            if name not in ("event", "time") and _is_number(value):
                yield Metric(f"system/{name}", float(value), moment, moment // 1000)
        return
    for name in _METRICS.get(kind, ()):
        if _is_number(event.get(name)):
            yield Metric(name, float(event[name]), moment, event["step"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", redact(str(value))[:_VALUE_LIMIT]
