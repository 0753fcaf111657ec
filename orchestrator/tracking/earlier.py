"""Runs of earlier commands, as their folders tell of them."""

from pathlib import Path

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError, first_line
from orchestrator.tracking.journal import read_events
from orchestrator.tracking.secrets import redact


def earlier_job(folder: Path, job: JobConfig) -> JobConfig:
    """The job a run was made with; a password that its file does not keep comes from `job`.

    Raises:
        OrchestratorError: its file is gone or damaged, or the password is not known here.
    """
    earlier = _read(folder / "job.yaml")
    kept, own = earlier.tracking.uri, job.tracking.uri
    if own is not None and kept in (own, redact(own)):
        return in_store(earlier, own)
    if kept is not None and "***" in kept:
        raise OrchestratorError(
            f"Events of {earlier.name} wait for MLflow at {kept}; run that job's own command "
            "again to deliver them, for its password is kept nowhere"
        )
    return earlier


def in_store(job: JobConfig, uri: str) -> JobConfig:
    """The job with another MLflow store."""
    tracking = job.tracking.model_copy(update={"uri": uri})
    return job.model_copy(update={"tracking": tracking})


def is_finished(journal: Path) -> bool:
    """Whether the run came to its end, by the last word on it in the journal."""
    ends = [e for e, _ in read_events(journal) if e["event"] in ("start", "finish")]
    return bool(ends) and ends[-1].get("status") == "finished"


def _read(path: Path) -> JobConfig:
    try:
        return JobConfig.model_validate(YAML(typ="safe", pure=True).load(path.read_text()))
    except (OSError, YAMLError, ValidationError) as error:
        reason = first_line(error)
        raise OrchestratorError(
            f"Events of {path.parent.name} wait for MLflow, but its job file cannot be read: "
            f"{path}: {reason}"
        ) from error
