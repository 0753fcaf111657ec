"""The MLflow UI over a job's store."""

import sys

from orchestrator.config import JobConfig
from orchestrator.tracking.store import artifact_location, tracking_uri

STORE_VARIABLE = "MLFLOW_BACKEND_STORE_URI"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def ui_command(job: JobConfig, port: int = 5000) -> list[str] | None:
    """The command that serves the UI on this machine alone; None where a server has one already.

    It expects the store's URI in `STORE_VARIABLE`, since other users see a command's arguments
    and the URI may hold a password.
    """
    uri = tracking_uri(job)
    if not uri.startswith(_DATABASES):
        return None
    # One worker serves one person; MLflow's default of four costs a gigabyte.
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]
    location = artifact_location(job)
    return command if location is None else [*command, "--default-artifact-root", location]
