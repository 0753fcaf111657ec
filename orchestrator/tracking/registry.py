"""Registered versions of adapters, and which of them is champion."""

from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orchestrator.tracking.champion import Version, successor

ALIAS = "champion"
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def register(
    client: MlflowClient, name: str, run_id: str, eval_loss: float | None, tags: dict[str, str]
) -> str:
    """Register the run's adapter and let it take the alias if it is the best.

    A run has one version however often this is called; a run that went on and saved a better
    adapter brings its version's tags up to date.

    Returns:
        The version.
    """
    if eval_loss is not None:
        tags = {**tags, "eval_loss": repr(eval_loss)}
    _ensure_model(client, name)
    number = _own_version(client, name, run_id)
    if number is None:
        source = f"{client.get_run(run_id).info.artifact_uri}/adapter"
        number = str(client.create_model_version(name, source, run_id, tags=tags).version)
    else:
        for key, value in tags.items():
            client.set_model_version_tag(name, number, key, value)
    _crown(client, name, Version(number, eval_loss))
    return number


def _crown(client: MlflowClient, name: str, candidate: Version) -> None:
    """Let a version take the alias if it is the best; where none has it, the best of all gets it.

    MLflow cannot set an alias on a condition, and another run may do the same meanwhile: a version
    must be better than those registered after the champion too, and a better one that came while it
    took the alias gets it.
    """
    champion = _champion(client, name)
    best = successor(champion, [candidate, *_registered_after(client, name, champion)])
    if champion is not None and best is not candidate:
        return
    while best and best is not champion:
        client.set_registered_model_alias(name, ALIAS, best.number)
        champion, best = best, successor(best, _registered_after(client, name, best))


def _ensure_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _own_version(client: MlflowClient, name: str, run_id: str) -> str | None:
    """The version that an earlier try, or an earlier adapter of this run, registered."""
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        if version.name == name:
            return str(version.version)
    return None


def _registered_after(client: MlflowClient, name: str, version: Version | None) -> list[Version]:
    least = 0 if version is None else int(version.number)
    # A name may hold one of the two kinds of quotes.
    found = client.search_model_versions(f"name = {name!r}")
    return [Version(str(v.version), _eval_loss(v)) for v in found if int(v.version) > least]


def _champion(client: MlflowClient, name: str) -> Version | None:
    try:
        found = client.get_model_version_by_alias(name, ALIAS)
    except MlflowException as error:
        if error.error_code in _ABSENT:
            return None
        raise
    return Version(str(found.version), _eval_loss(found))


def _eval_loss(version: Any) -> float | None:
    try:
        return float(version.tags["eval_loss"])
    except (KeyError, ValueError):
        # Tags can be edited by hand.
        return None
