"""Registered versions of adapters, and which of them is champion."""

from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orchestrator.config import JobConfig
from orchestrator.tracking.champion import becomes_champion
from orchestrator.tracking.secrets import redact

ALIAS = "champion"


def register(
    client: MlflowClient,
    name: str,
    run_id: str,
    eval_loss: float | None,
    step: int,
    job: JobConfig,
) -> str:
    """Register the run's adapter once and let it take the alias if it is the best.

    Returns:
        The version.
    """
    _ensure_model(client, name)
    version = _own_version(client, name, run_id, step)
    if version is None:
        artifacts = client.get_run(run_id).info.artifact_uri
        tags: dict[str, Any] = {"step": str(step), "base": redact(job.model.base), "job": job.name}
        if eval_loss is not None:
            tags["eval_loss"] = repr(eval_loss)
        made = client.create_model_version(name, f"{artifacts}/adapter", run_id, tags=tags)
        version = str(made.version)
    present = _champion(client, name)
    if present is None or (
        str(present.version) != version and becomes_champion(eval_loss, _eval_loss(present))
    ):
        client.set_registered_model_alias(name, ALIAS, version)
    return version


def _ensure_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _own_version(client: MlflowClient, name: str, run_id: str, step: int) -> str | None:
    """The version an earlier try registered for this adapter."""
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if version.tags.get("step") == str(step):
            return str(version.version)
    return None


def _champion(client: MlflowClient, name: str) -> Any:
    try:
        return client.get_model_version_by_alias(name, ALIAS)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _eval_loss(version: Any) -> float | None:
    text = version.tags.get("eval_loss")
    return None if text is None else float(text)
