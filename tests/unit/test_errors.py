"""Errors a user meets: the same after a journey between processes."""

import inspect
import pickle

import pytest

from orchestrator import errors

CLASSES = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if found.__module__ == errors.__name__
]
MESSAGE = "job.yaml:6: lora.rank: 0 is not allowed;\ngive more — or less"


def test_all_of_them_are_looked_at() -> None:
    assert {errors.OrchestratorError, errors.DataError, errors.WorkerLostError} <= set(CLASSES)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling(kind: type[Exception]) -> None:
    again = pickle.loads(pickle.dumps(kind(MESSAGE)))
    assert type(again) is kind and str(again) == MESSAGE
    assert getattr(again, "exit_status", None) == getattr(kind, "exit_status", None)


@pytest.mark.parametrize("kind", [c for c in CLASSES if issubclass(c, errors.OrchestratorError)])
def test_no_error_ends_a_command_as_if_it_were_done(kind: type[errors.OrchestratorError]) -> None:
    assert kind.exit_status in (1, 2, 130)
    assert (kind.exit_status == 2) == issubclass(kind, errors.RefusedError)
