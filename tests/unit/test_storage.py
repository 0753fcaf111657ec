"""The mirror of a run in a store, on Arrow's file system of a folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from orchestrator.config import JobConfig
from orchestrator.errors import JobFileError, OrchestratorError
from orchestrator.jobfile import job_from_mapping
from orchestrator.places import CACHE_VARIABLE
from orchestrator.storage.background import patiently, repeated
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.place import Place
from orchestrator.storage.store import Store
from orchestrator.storage.uri import below
from orchestrator.tracking.cursor import Cursor
from orchestrator.tracking.journal import Journal, journal_path
from orchestrator.training import checkpoint
from orchestrator.training.checkpoint import Checkpoint


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """What the store holds, as a folder."""
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


class Recorder:
    """A store that keeps the order of what is written, and refuses when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(SubTreeFileSystem(str(folder), LocalFileSystem()), "runs/a")
        self.written: list[str] = []
        self.refuses: str | None = None
        opened = self.store._open

        def open_recorded(name: str) -> Any:
            if self.refuses is not None and self.refuses in name:
                raise OSError(f"{name} is refused")
            self.written.append(name)
            return opened(name)

        self.store._open = open_recorded  # type: ignore[method-assign]


def _mirror(there: Path, folder: Path, checkpoints: bool = True) -> Mirror:
    return Mirror(Recorder(there).store, folder, checkpoints)


def _steps(folder: Path, first: int, last: int) -> None:
    with Journal(journal_path(folder)) as journal:
        for step in range(first, last + 1):
            journal.append("step", step=step, loss=1 / step)


def _save(folder: Path, step: int, value: float | None = None) -> None:
    tensors = {"adapter": {"a": torch.full((3,), float(step if value is None else value))}}
    checkpoint.write(folder / "checkpoints", Checkpoint(step, tensors, {"step": step}))


def _run(there: Path, folder: Path, steps: int = 4) -> Mirror:
    """A run with a key, some steps and a checkpoint, pushed."""
    mirror = _mirror(there, folder)
    mirror.pull()
    Cursor.load(folder)
    _steps(folder, 1, steps)
    _save(folder, steps)
    mirror.push_records()
    mirror.push(prune=True)
    return mirror


def _step_numbers(folder: Path) -> list[int]:
    lines = journal_path(folder).read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def _saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def test_another_machine_finds_the_run(there: Path, tmp_path: Path) -> None:
    _run(there, tmp_path / "one")
    other = _mirror(there, tmp_path / "two")
    other.pull()
    assert _step_numbers(tmp_path / "two") == [1, 2, 3, 4] and other.begun()
    found = checkpoint.newest(tmp_path / "two" / "checkpoints", pytest.fail)
    assert found is not None and torch.equal(found.tensors["adapter"]["a"], torch.full((3,), 4.0))
    assert Cursor.load(tmp_path / "two").run_key == Cursor.load(tmp_path / "one").run_key


def test_a_run_or_a_trial_with_a_checkpoint_has_begun(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "trials" / "a").mkdir(parents=True)
    assert not place.begun()
    (tmp_path / "trials" / "a" / "checkpoints").mkdir()
    assert place.begun()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert Place(tmp_path / "run").begun()


def test_journal_first_then_checkpoints_with_their_digests_last(
    there: Path, tmp_path: Path
) -> None:
    recorder = Recorder(there)
    mirror = Mirror(recorder.store, tmp_path / "one", checkpoints=True)
    mirror.pull()
    _steps(tmp_path / "one", 1, 9)
    for step in (3, 6, 9):
        _save(tmp_path / "one", step)
    mirror.push(prune=True)
    names = recorder.written
    # What fails because a folder is missing is written again once the folder is made.
    once = [name for number, name in enumerate(names) if name not in names[:number]]
    assert once == [
        "journal.jsonl",
        *(f"checkpoints/step-0000000{step}/{file}"
          for step in (9, 6, 3) for file in ("adapter.safetensors", "state.json")),
    ]  # fmt: skip


def test_an_upload_that_was_cut_off_is_no_checkpoint(there: Path, tmp_path: Path) -> None:
    folder, recorder = tmp_path / "one", Recorder(there)
    mirror = Mirror(recorder.store, folder, checkpoints=True)
    mirror.pull()
    Cursor.load(folder)
    mirror.push_records()
    _steps(folder, 1, 6)
    _save(folder, 3)
    mirror.push(prune=True)
    _save(folder, 6)
    recorder.refuses = "step-00000006/state.json"
    with pytest.raises(OSError, match="refused"):
        mirror.push(prune=True)
    other = _mirror(there, tmp_path / "two")
    other.pull()
    assert _saved(tmp_path / "two") == ["step-00000003"]
    # Who goes on makes it whole, or clears it away.
    recorder.refuses = None
    mirror.push(prune=True)
    again = _mirror(there, tmp_path / "three")
    again.pull()
    assert _saved(tmp_path / "three") == ["step-00000003", "step-00000006"]


def test_what_the_folder_prunes_goes_from_the_store(there: Path, tmp_path: Path) -> None:
    mirror = _run(there, tmp_path / "one")
    _save(tmp_path / "one", 5)
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "step-00000004")
    mirror.push(prune=True)
    assert sorted(p.name for p in (there / "runs/a/checkpoints").iterdir()) == ["step-00000005"]


def test_a_folder_that_is_further_on_keeps_what_it_has(there: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    _run(there, folder)
    _steps(folder, 5, 7)
    _save(folder, 7)
    again = _mirror(there, folder)
    again.pull()
    assert _step_numbers(folder) == list(range(1, 8)) and "step-00000007" in _saved(folder)
    again.push(prune=False)
    other = _mirror(there, tmp_path / "two")
    other.pull()
    assert _step_numbers(tmp_path / "two") == list(range(1, 8))
    assert _saved(tmp_path / "two") == ["step-00000004", "step-00000007"]


def test_a_folder_that_went_another_way_takes_what_the_store_has(
    there: Path, tmp_path: Path
) -> None:
    _run(there, tmp_path / "one")
    two = _mirror(there, tmp_path / "two")
    two.pull()
    _steps(tmp_path / "one", 5, 8)
    _save(tmp_path / "one", 8)
    _steps(tmp_path / "two", 5, 5)
    _save(tmp_path / "two", 5)
    two.push(prune=True)
    back = _mirror(there, tmp_path / "one")
    back.pull()
    assert _step_numbers(tmp_path / "one") == [1, 2, 3, 4, 5]
    assert _saved(tmp_path / "one") == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("deleted", [True, False])
def test_another_run_of_the_name_leaves_nothing_behind(
    there: Path, tmp_path: Path, deleted: bool
) -> None:
    """The user deleted the run in the store; another machine may have begun it anew."""
    _run(there, tmp_path / "one")
    (tmp_path / "one" / "result.json").write_text("{}")
    shutil.rmtree(there / "runs")
    if not deleted:
        _run(there, tmp_path / "two", steps=2)
    again = _mirror(there, tmp_path / "one")
    again.pull()
    assert not (tmp_path / "one" / "result.json").exists()
    assert again.begun() is not deleted
    if deleted:
        assert not _saved(tmp_path / "one") and not journal_path(tmp_path / "one").exists()
    else:
        assert _step_numbers(tmp_path / "one") == [1, 2]
        assert _saved(tmp_path / "one") == ["step-00000002"]


def test_a_process_that_was_taken_for_dead_writes_over_nothing(there: Path, tmp_path: Path) -> None:
    old = _run(there, tmp_path / "one")
    new = _mirror(there, tmp_path / "two")
    new.pull()
    _steps(tmp_path / "two", 5, 9)
    new.push(prune=True)
    _steps(tmp_path / "one", 5, 6)
    with pytest.raises(OSError, match="another process"):
        old.push(prune=True)
    assert _step_numbers(there / "runs/a") == list(range(1, 10))


def test_the_command_follows_the_journal_and_has_the_adapter_before_its_line(
    there: Path, tmp_path: Path
) -> None:
    leader, folder = _run(there, tmp_path / "one"), tmp_path / "two"
    command = _mirror(there, folder, checkpoints=False)
    command.pull()
    assert not _saved(folder)
    _steps(tmp_path / "one", 5, 6)
    leader.push(prune=True)
    command.follow()
    assert _step_numbers(folder) == list(range(1, 7)) and not (folder / "adapter").exists()
    adapter = tmp_path / "one" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_text("weights")
    assert not command.has_adapter()
    with Journal(journal_path(tmp_path / "one")) as journal:
        journal.append("adapter", step=6, path=str(adapter))
    leader.push(prune=True)
    command.follow()
    assert (folder / "adapter" / "adapter_model.safetensors").read_text() == "weights"
    with Journal(journal_path(folder)) as journal:
        journal.append("finish", status="finished")
    command.push(prune=False)
    assert (there / "runs/a/journal.jsonl").read_bytes() == journal_path(folder).read_bytes()


def test_a_store_that_is_away_for_a_while_is_told_of_once_and_gets_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestrator.storage.background._PAUSE_SECONDS", 0.001)
    said: list[str] = []
    calls, ends = [0], []

    def work() -> None:
        calls[0] += 1
        if calls[0] < 4:
            raise OSError("https://me:hunter22@host refuses")

    with repeated(work, lambda: ends.append(1), said.append):
        while calls[0] < 6:
            pass
    assert ends == [1] and len(said) == 2
    assert "does not take" in said[0] and "hunter22" not in said[0] and "again" in said[1]


def test_the_first_error_stays_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.storage.background._PATIENCE_SECONDS", 0.5)

    def away() -> None:
        raise OSError("away")

    def lost() -> None:
        raise OrchestratorError("the store does not take the adapter")

    said: list[str] = []
    with pytest.raises(ValueError, match="mine"), repeated(away, lost, said.append):
        raise ValueError("mine")
    with pytest.raises(OrchestratorError, match="mine"), repeated(away, lost, said.append):
        raise OrchestratorError("mine")
    assert said == ["away", "the store does not take the adapter"]
    with pytest.raises(OrchestratorError, match="adapter"), repeated(away, lost, said.append):
        pass
    with pytest.raises(OSError, match="away"):
        patiently(away)


def _job(output_dir: str) -> JobConfig:
    return job_from_mapping(
        {"name": "a", "output_dir": output_dir, "model": {"base": "b"}, "data": {"train": "c"}}
    )


def test_what_output_dir_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert _job("runs").run_dir == Path("runs/a")
    assert _job("file:///mnt/my%20runs").run_dir == Path("/mnt/my runs/a")
    mirror = _job("s3://bucket/runs").run_dir
    assert mirror.is_relative_to(tmp_path / "runs") and mirror.name == "a"
    assert _job("s3://key:secret@bucket/runs/?secret_key=s").run_dir == mirror
    assert _job("s3://bucket/others").run_dir != mirror
    assert _job("s3://bucket/runs?endpoint_override=http://host").run_dir != mirror
    for wrong in ("http://host/runs", "s3:///runs", "s3://me:swordfish@", "file://host/runs"):
        with pytest.raises(JobFileError, match=r"s3://bucket/runs") as refused:
            _job(wrong)
        assert "swordfish" not in str(refused.value)


def test_no_secret_of_a_uri_is_shown() -> None:
    uri = "s3://key:swordfish@bucket/runs?region=r&secret_key=swordfish&endpoint_override=http://h"
    assert below(uri, "my run/adapter") == (
        "s3://bucket/runs/my%20run/adapter?region=r&endpoint_override=http%3A%2F%2Fh"
    )
    assert "swordfish" not in repr(_job(uri)) + str(_job(uri))
