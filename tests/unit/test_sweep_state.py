"""Tune's state is whole or not there, and a damaged one is named."""

import gc
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.sweep.driver import _speak_for
from orchestrator.sweep.outcome import outcomes, spent_seconds
from orchestrator.sweep.state_files import check_readable, has_state, whole_files
from orchestrator.tracking.journal import Journal, journal_path
from tests.unit.sweeps import Trained, sweep_job, write_trials


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


def test_a_search_that_was_killed_before_its_first_word_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "tuner.pkl").write_bytes(b"made")
    assert not has_state(tmp_path)
    (tmp_path / "experiment_state-2026-01-01_10-00-00.json").write_text("{}")
    assert has_state(tmp_path)


def test_trials_that_could_not_say_it_themselves_have_a_last_word(tmp_path: Path) -> None:
    params = {"lora.rank": 4, "training.learning_rate": 1e-3}
    stopped, unknown = Trained(params, [4, 3], "stopped"), Trained(params, [4], None)
    trials = write_trials(sweep_job(tmp_path), [Trained(params, [4] * 6), stopped, unknown])
    gone = RuntimeError("ray::Trial.train()\n  a traceback\nActorDiedError: killed three times")
    errors = {"abc_00000": None, "abc_00001": gone}
    said: list[str] = []
    results = [SimpleNamespace(path=trials / n, error=e, metrics={}) for n, e in errors.items()]
    impossible = {"path": trials / "abc_9", "error": None, "config": {"lora.rank": -1}}
    results.append(SimpleNamespace(**impossible, metrics={"error": "lora.rank is negative"}))
    _speak_for(trials, results, said.append)
    assert said == ["Trial abc_9 of {'lora.rank': -1} failed: lora.rank is negative"]
    found = [(o.status, o.error) for o in outcomes(trials)]
    assert found == [
        ("finished", None),
        ("failed", "ActorDiedError: killed three times"),
        ("interrupted", "The sweep was killed before it had noted this trial"),
    ]


def test_the_time_of_a_sweep_leaves_out_the_pauses_between_its_commands(tmp_path: Path) -> None:
    assert spent_seconds(tmp_path) == 0
    with Journal(journal_path(tmp_path)) as journal:
        for moment, event in ((100, "command"), (110, "system"), (500, "command"), (507, "finish")):
            journal.append(event, time=float(moment))
    with Journal(journal_path(tmp_path / "trials" / "a")) as journal:
        for moment, step in ((104, 1), (113, 2), (503, 3)):
            journal.append("step", step=step, time=float(moment))
    assert spent_seconds(tmp_path) == 13 + 7
