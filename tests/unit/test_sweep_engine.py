"""What all trials of a sweep have in common."""

from pathlib import Path

import pytest

from orchestrator.errors import RefusedError
from orchestrator.sweep.engine import _check_ground


def test_a_sweep_goes_on_over_the_base_and_the_data_that_it_began_with(tmp_path: Path) -> None:
    began = {"base": "llama-1", "data": "rows-1"}
    _check_ground(began, tmp_path, leads=False)
    assert not list(tmp_path.iterdir())
    _check_ground(began, tmp_path, leads=True)
    for leads in (True, False):
        _check_ground(dict(began), tmp_path, leads)
        with pytest.raises(RefusedError, match="over another data"):
            _check_ground({**began, "data": "rows-2"}, tmp_path, leads)
