"""A client of a job's MLflow store, and what its errors mean. Imports MLflow when called."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from orchestrator.config import JobConfig
from orchestrator.tracking.store import FOLDERS_ALLOWED, tracking_uri

# What is set where the user has no word of her own.
# MLflow repeats a failed request seven times over four minutes, and a repeated "create run" whose
# answer was lost makes a second run. Delivery itself tries again, and looks before it creates.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    **FOLDERS_ALLOWED,
}
# Its migrations take some ten seconds on a slow disk.
_MAKING_SECONDS = 120
_STORE_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("boto3.exceptions", "Boto3Error"),
)
_TALKATIVE = ("mlflow", "alembic")


def connect(job: JobConfig) -> Any:
    """An `MlflowClient` of the job's store; what the user set in the environment stays."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # After the import, which sets MLflow's own levels.
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    uri = tracking_uri(job)
    if uri.startswith("sqlite:///"):
        _make_database(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_database(path: Path) -> None:
    """Make MLflow's SQLite store beside and rename it.

    A kill amid its first migrations would leave a store that no command can use any more.
    """
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=_MAKING_SECONDS):
        if path.exists():
            return
        beside = path.with_name(f".{path.name}.new")
        for left in path.parent.glob(f"{beside.name}*"):
            left.unlink()
        uri = f"sqlite:///{beside}"
        MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
        beside.replace(path)


def complaint(error: Exception) -> str | None:
    """What an error of MLflow's means for the user; None for one that is no matter of MLflow's."""
    mlflow, database = sys.modules.get("mlflow.exceptions"), sys.modules.get("sqlalchemy.exc")
    if mlflow is not None and isinstance(error, mlflow.MlflowException):
        status = error.get_http_status_code()
        return "does not answer" if status >= 500 or status == 429 else "refuses what it is sent"
    if database is not None and isinstance(error, database.OperationalError):
        return "does not answer"
    # The client itself takes artifacts to S3 where the server says so.
    for module, name in _STORE_ERRORS:
        library = sys.modules.get(module)
        if library is not None and isinstance(error, getattr(library, name)):
            return "does not take artifacts"
    return "cannot be reached" if isinstance(error, OSError) else None
