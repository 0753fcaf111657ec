"""What all trials of a sweep have in common, and what its engines tell one another."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.errors import InterruptedRunError, OrchestratorError, RefusedError
from orchestrator.sweep import engine
from orchestrator.sweep.engine import DeskMembership, _check_ground
from orchestrator.training.membership import Wishes


def test_a_sweep_goes_on_over_the_base_and_the_data_that_it_began_with(tmp_path: Path) -> None:
    began = {"base": "llama-1", "data": "rows-1"}
    _check_ground(began, tmp_path, leads=False)
    assert not list(tmp_path.iterdir())
    _check_ground(began, tmp_path, leads=True)
    for leads in (True, False):
        _check_ground(dict(began), tmp_path, leads)
        with pytest.raises(RefusedError, match="over another data"):
            _check_ground({**began, "data": "rows-2"}, tmp_path, leads)


def test_all_engines_hear_of_one_that_cannot_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command hears the first one only. Of a stop each hears by itself, and saves first."""
    told: list[OrchestratorError] = []
    monkeypatch.setattr(engine, "_answer", lambda answer: answer)
    desk = SimpleNamespace(
        broken=SimpleNamespace(remote=told.append),
        wishes=SimpleNamespace(remote=lambda *_: Wishes({}, {}, error=told[-1])),
    )
    membership = DeskMembership(desk, 1, 2, 1)
    for error in (InterruptedRunError("stopped"), OrchestratorError("full")):
        with pytest.raises(type(error)), membership.all_hear():
            raise error
    assert list(map(str, told)) == ["full"]
    with pytest.raises(OrchestratorError, match="full"):
        membership.wishes([])
