"""Which MLflow store a job uses."""

from orchestrator.config import JobConfig

# MLflow takes a folder as its store only from who says so; who names one as the store does.
FOLDERS_ALLOWED = {"MLFLOW_ALLOW_FILE_STORE": "true"}


def tracking_uri(job: JobConfig) -> str:
    """The job's MLflow tracking URI: its own, or SQLite under output_dir."""
    if job.tracking.uri is not None:
        return job.tracking.uri
    return f"sqlite:///{job.local_dir.absolute() / 'mlflow.db'}"


def artifact_location(job: JobConfig) -> str | None:
    """Where a new experiment keeps its files; None leaves it to the server."""
    if job.tracking.uri is not None:
        return None
    return (job.local_dir.absolute() / "mlartifacts").as_uri()
