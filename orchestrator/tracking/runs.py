"""Finding or making the one MLflow run of a run folder."""

from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orchestrator.config import JobConfig
from orchestrator.errors import OrchestratorError
from orchestrator.tracking.store import artifact_location

_KEY_TAG = "orchestrator.run_key"
_NAME_TAG = "orchestrator.name"


def find_or_create(
    client: MlflowClient, job: JobConfig, run_key: str, started: int, parent: str | None = None
) -> str:
    """The run that bears our key: an earlier try may have made it just before it died.

    Args:
        client: of the job's store.
        job: names the experiment and the run.
        run_key: our name of the run; it was saved before this call.
        started: when training began, in milliseconds.
        parent: id of the sweep's run that this trial's is nested in.
    """
    experiment = _experiment_id(client, job)
    found = _bearing(client, experiment, run_key)
    if found:
        return str(found[0].info.run_id)
    tags = {_KEY_TAG: run_key, _NAME_TAG: job.name}
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    made = client.create_run(experiment, start_time=started, tags=tags, run_name=job.name)
    return str(made.info.run_id)


def still_there(client: MlflowClient, run_id: str) -> bool:
    """Whether the store knows the run.

    Raises:
        OrchestratorError: the user deleted it there.
    """
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    if run.info.lifecycle_stage == "deleted":
        raise OrchestratorError(
            f"MLflow run {run_id} was deleted there, so nothing more is delivered to it. Restore "
            "it there, or delete .delivery.json and .run_key in the run's folder to deliver it anew"
        )
    return True


def remove_doubles(client: MlflowClient, run_id: str, run_key: str) -> None:
    """Delete empty runs of our key that a server made after we had given up waiting for it."""
    for run in _bearing(client, client.get_run(run_id).info.experiment_id, run_key):
        if run.info.run_id != run_id and not run.data.metrics:
            client.delete_run(run.info.run_id)


def _bearing(client: MlflowClient, experiment_id: str, run_key: str) -> list[Any]:
    """Runs that bear the key, the oldest first."""
    mark = f"tags.`{_KEY_TAG}` = '{run_key}'"
    return list(client.search_runs([experiment_id], mark, order_by=["attributes.start_time ASC"]))


def _experiment_id(client: MlflowClient, job: JobConfig) -> str:
    name = job.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location(job)))
    except MlflowException:
        # Another run made it in the meantime.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)
