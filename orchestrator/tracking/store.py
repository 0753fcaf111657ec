"""Which MLflow store a job uses."""

from pathlib import Path

from orchestrator.config import JobConfig

# MLflow takes a folder as its store only from who says so; who names one as the store does.
FOLDERS_ALLOWED = {"MLFLOW_ALLOW_FILE_STORE": "true"}


def tracking_uri(job: JobConfig) -> str:
    """The job's MLflow tracking URI: its own, or SQLite under output_dir."""
    if job.tracking.uri is not None:
        return job.tracking.uri
    return f"sqlite:///{job.local_dir.absolute() / 'mlflow.db'}"


def artifact_location(job: JobConfig) -> str | None:
    """Where a new experiment keeps its files: beside a database in a file, else as the server says.

    MLflow itself would put them in the folder that the command happens to be given in.
    """
    kind, _, path = tracking_uri(job).partition("?")[0].partition(":///")
    if kind != "sqlite":
        return None
    return (Path(path).absolute().parent / "mlartifacts").as_uri()
