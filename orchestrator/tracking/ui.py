"""The MLflow UI over a job's store."""

import sys

from orchestrator.config import JobConfig
from orchestrator.tracking.store import FOLDERS_ALLOWED, artifact_location, tracking_uri

_STORE_VARIABLE = "MLFLOW_BACKEND_STORE_URI"
_SERVERS = ("http://", "https://", "databricks")


def ui_command(job: JobConfig, port: int = 5000) -> list[str] | None:
    """The command that serves the UI on this machine alone; None where a server has one already.

    It expects `ui_environment`.
    """
    uri = tracking_uri(job)
    if uri.startswith(_SERVERS):
        return None
    # One worker serves one person; MLflow's default of four costs a gigabyte.
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]
    location = artifact_location(job)
    return command if location is None else [*command, "--default-artifact-root", location]


def ui_environment(job: JobConfig) -> dict[str, str]:
    """Where the UI finds the store. Others see arguments, and a URI may hold a password."""
    return {_STORE_VARIABLE: tracking_uri(job), **FOLDERS_ALLOWED}
