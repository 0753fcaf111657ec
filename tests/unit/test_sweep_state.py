"""Tune's state is whole or not there, and a damaged one is named."""

import gc
import json
import pickle
from pathlib import Path

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.sweep.state_files import check_readable, whole_files


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    # Trials in other processes are given the filesystem too.
    files = pickle.loads(pickle.dumps(whole_files()))
    path = tmp_path / "state.json"
    path.write_text("old")
    stream = files.open_output_stream(str(path))
    stream.write(b"ne")
    assert path.read_text() == "old"
    stream.write(b"w")
    stream.close()
    assert path.read_text() == "new" and files.open_input_stream(str(path)).read() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_given_up_halfway_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    stream = whole_files().open_output_stream(str(path))
    stream.write(b"ha")
    del stream
    gc.collect()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_state_that_a_disk_has_lost_some_of_is_named(tmp_path: Path) -> None:
    check_readable(tmp_path)
    old = tmp_path / "experiment_state-2026-01-01_10-00-00.json"
    old.write_text('{"trial_data": [')
    new = tmp_path / "experiment_state-2026-01-01_11-00-00.json"
    new.write_text(json.dumps({"trial_data": []}))
    check_readable(tmp_path)
    new.write_text(new.read_text()[:8])
    with pytest.raises(OrchestratorError, match=f"{new.name} is damaged.*searches anew"):
        check_readable(tmp_path)
