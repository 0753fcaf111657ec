"""Events become an MLflow run. Every call may be repeated and changes nothing the second time."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError
from orchestrator.tracking import registry, report, runs, values
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.earlier import earlier_job
from orchestrator.tracking.journal import journal_path, read_events
from orchestrator.tracking.secrets import redact

_STATUSES = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "failed": "FAILED",
    "refused": "FAILED",
    "interrupted": "KILLED",
}
_LONGEST_DIGEST = 36
_LONGEST_DATASET_NAME = 500

Event = Mapping[str, Any]


class Replay:
    """Delivers events of one run to its place in MLflow.

    `cursor` holds what was learnt on the way; it is saved when a repetition would be dear.
    """

    def __init__(self, client: MlflowClient, job: JobConfig, run_dir: Path, cursor: Cursor) -> None:
        self.cursor = cursor
        self._client, self._job, self._run_dir = client, job, run_dir
        self._run_id = str(cursor.run_id)
        self._described = False
        self._handlers = {
            "start": self._start,
            "places": self._go_on,
            "best": self._best,
            "plan": self._plan,
            "budget": self._budget,
            "adapter": self._adapter,
            "finish": self._finish,
            "files": self._files,
        }

    def deliver(self, events: Sequence[Event]) -> None:
        """Deliver events in the journal's order."""
        if not self._described:
            # A sweep has no start of its own, nor has a trial that could not join.
            self._log_parameters(values.parameters(self._job))
            self._log_job_file()
            self._described = True
        self._log_metrics(events)
        if any(event["event"] == "sample" for event in events):
            self._log_samples()
        for event in events:
            handler = self._handlers.get(event["event"])
            if handler is not None:
                handler(event)

    def _log_metrics(self, events: Sequence[Event]) -> None:
        metrics = [Metric(*reading) for event in events for reading in values.readings(event)]
        # The client cuts what is too long for one request, here and below.
        self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
        self._set_tags(
            {name: tag for event in events for name, tag in values.broken(event).items()}
        )

    def _go_on(self, event: Event) -> None:
        """A sweep's engines and trials are about to begin, or to begin again."""
        self._client.update_run(self._run_id, status="RUNNING")

    def _start(self, event: Event) -> None:
        self._client.update_run(self._run_id, status="RUNNING")
        base, environment = event.get("base", {}), event.get("environment", {})
        described = ("device", "workers", "trainable_parameters", "tokens_per_pass")
        self._set_tags(
            {
                "state": "running",
                **{f"base.{name}": value for name, value in base.items()},
                **{name: event[name] for name in described if name in event},
                **{f"environment.{name}": value for name, value in environment.items()},
            }
        )
        if "dataset" in event:
            self._log_dataset(event["dataset"])
        with suppress(OrchestratorError):
            # A population's trial starts again as another.
            self._log_parameters(values.parameters(earlier_job(self._run_dir, self._job)))
        shown = {name: values.text(value) for name, value in environment.items()}
        self._client.log_dict(self._run_id, shown, "environment.json")
        self._log_job_file()

    def _log_job_file(self) -> None:
        if (self._run_dir / "job.yaml").exists():
            text = redact((self._run_dir / "job.yaml").read_text())
            self._client.log_text(self._run_id, text, "job.yaml")

    def _plan(self, event: Event) -> None:
        names = ("fits", "gpu_bytes", "tokens_per_pass", "tokens_per_second")
        tags = {f"plan.{name}": event[name] for name in names if name in event}
        total = event.get("per_gpu_bytes", {}).get("total")
        self._set_tags({**tags, "plan.total_bytes": total})
        self._log_plan()

    def _log_plan(self) -> None:
        content = report.planned_and_measured(self._journal())
        if content is not None:
            self._client.log_dict(self._run_id, content, "plan.json")
            measured = content["measured"]
            self._set_tags({f"measured.{name}": value for name, value in measured.items()})

    def _budget(self, event: Event) -> None:
        self._set_tags({"tokens_per_pass": event.get("tokens_per_pass")})

    def _log_parameters(self, wanted: Mapping[str, str]) -> None:
        """MLflow's parameters never change; one that did since the run began becomes a tag."""
        run = self._client.get_run(self._run_id).data
        fresh = [Param(name, value) for name, value in wanted.items() if name not in run.params]
        self._client.log_batch(self._run_id, params=fresh, synchronous=True)
        self._set_tags(
            {
                f"changed.{name}": value
                for name, value in wanted.items()
                if run.params.get(name, value) != value or f"changed.{name}" in run.tags
            }
        )

    def _log_dataset(self, dataset: Mapping[str, Any]) -> None:
        source = values.text(dataset.get("name", "unknown"))
        counts = {name: value for name, value in dataset.items() if name not in ("name", "digest")}
        entity = Dataset(
            name=Path(source).name[:_LONGEST_DATASET_NAME] or "data",
            digest=str(dataset.get("digest", "unknown"))[:_LONGEST_DIGEST],
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=redact(json.dumps(counts, default=str)),
        )
        context = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(self._run_id, [DatasetInput(entity, [context])])

    def _best(self, event: Event) -> None:
        """What a sweep's best trial was."""
        found = {f"best.{name}": value for name, value in event["params"].items()}
        self._log_parameters({values.key(k): values.text(value) for k, value in found.items()})
        self._set_tags({"best.trial_id": event["trial_id"]})

    def _adapter(self, event: Event) -> None:
        # Its path is that of the machine which trained it.
        folder, eval_loss = self._run_dir / "adapter", event.get("eval_loss")
        if not folder.is_dir():
            self._set_tags({"adapter.missing": f"{folder} was gone when it was to be delivered"})
            return
        fingerprint = _fingerprint(folder)
        if self.cursor.uploaded.get("adapter") != fingerprint:
            self._client.log_artifacts(self._run_id, str(folder), "adapter")
            self._keep(uploaded={**self.cursor.uploaded, "adapter": fingerprint})
        self._set_tags({f"proof.{k}": value for k, value in (event.get("proof") or {}).items()})
        name = self._job.tracking.registered_model
        if name is not None:
            about = {"step": event.get("step"), "base": self._job.model.base, "job": self._job.name}
            tags = {key: values.text(value) for key, value in about.items()}
            version = registry.register(self._client, name, self._run_id, eval_loss, tags)
            self._keep(model_version=version)

    def _files(self, event: Event) -> None:
        folder = Path(event["path"])
        if folder.is_dir():
            self._client.log_artifacts(self._run_id, str(folder), folder.name)
            self._show_tables([f"{folder.name}/{name}" for name in event.get("tables", ())])

    def _finish(self, event: Event) -> None:
        spent = {name: event[name] for name in ("steps", "tokens", "seconds") if name in event}
        self._set_tags({"state": event.get("status"), **spent})
        figure = report.loss_curve(self._journal(), self._job.name)
        if figure is not None:
            self._client.log_figure(self._run_id, figure, "plots/loss.png")
        if event.get("error"):
            self._set_tags({"error": event["error"]})
        elif "error" in self._client.get_run(self._run_id).data.tags:
            # Of an attempt before this one.
            self._client.delete_tag(self._run_id, "error")
        self._log_plan()
        runs.remove_doubles(self._client, self._run_id, self.cursor.run_key)
        status = _STATUSES.get(event.get("status", ""), "FAILED")
        self._client.set_terminated(self._run_id, status, values.milliseconds(event))

    def _log_samples(self) -> None:
        """The whole table each time: MLflow's own `log_table` appends, and would double rows."""
        table = report.sample_table(self._journal())
        if table is not None:
            self._client.log_dict(self._run_id, table, "samples.json")
            self._show_tables(["samples.json"])

    def _show_tables(self, paths: Sequence[str]) -> None:
        """Let MLflow's UI show these artifacts as tables."""
        shown = [{"path": path, "type": "table"} for path in paths]
        self._client.set_tag(self._run_id, "mlflow.loggedArtifacts", json.dumps(shown))

    def _set_tags(self, tags: Mapping[str, Any]) -> None:
        items = [RunTag(values.key(k), values.text(value)) for k, value in tags.items()]
        self._client.log_batch(self._run_id, tags=items, synchronous=True)

    def _journal(self) -> list[dict[str, Any]]:
        return [event for event, _ in read_events(journal_path(self._run_dir))]

    def _keep(self, **learnt: Any) -> None:
        self.cursor = replace(self.cursor, **learnt)
        self.cursor.save(self._run_dir)


def _fingerprint(folder: Path) -> str:
    """Changes when a file of the folder does; reads names, sizes and times only."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path, path.stat()) for path in files]
    lines = [f"{p.relative_to(folder)} {s.st_size} {s.st_mtime_ns}" for p, s in stats]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
