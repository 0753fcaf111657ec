"""The MLflow UI over a job's store."""

import sys

from orchestrator.config import JobConfig
from orchestrator.tracking.store import artifact_location, tracking_uri


def ui_command(job: JobConfig, port: int) -> list[str] | None:
    """The command that serves the UI on this machine alone; None where a server has one already."""
    uri = tracking_uri(job)
    if uri.startswith(("http://", "https://")):
        return None
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", uri]
    location = artifact_location(job)
    return command if location is None else [*command, "--default-artifact-root", location]
