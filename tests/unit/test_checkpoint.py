"""Checkpoints on disk."""

from pathlib import Path

import pytest
import torch

from orchestrator.errors import CheckpointError
from orchestrator.training import checkpoint
from orchestrator.training.checkpoint import Checkpoint


def _checkpoint(step: int) -> Checkpoint:
    tensors = {"adapter": {"a": torch.full((3,), float(step))}, "optimizer": {}}
    return Checkpoint(step, tensors, {"progress": {"step": step}})


def test_newest_whole_one_is_read(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoint.write(tmp_path, _checkpoint(step))
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None and found.step == 15
    assert torch.equal(found.tensors["adapter"]["a"], torch.full((3,), 15.0))
    assert found.state == {"progress": {"step": 15}}


@pytest.mark.parametrize("fault", ["truncate", "flip", "no_state", "torn_state", "no_file"])
def test_damaged_ones_are_named_and_passed_over(tmp_path: Path, fault: str) -> None:
    for step in (5, 10):
        checkpoint.write(tmp_path, _checkpoint(step))
    folder = tmp_path / "step-00000010"
    weights, state = folder / "adapter.safetensors", folder / "state.json"
    content = bytearray(weights.read_bytes())
    if fault == "truncate":
        weights.write_bytes(content[: len(content) // 2])
    elif fault == "flip":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif fault == "no_state":
        state.unlink()
    elif fault == "torn_state":
        state.write_text(state.read_text()[:20])
    else:
        weights.unlink()
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.step == 5
    assert len(said) == 1 and "step-00000010 is damaged" in said[0]
    checkpoint.write(tmp_path, _checkpoint(10))
    assert checkpoint.newest(tmp_path, pytest.fail).step == 10


def test_best_and_last_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.write(tmp_path, _checkpoint(step))
    (tmp_path / ".step-00000009.77").mkdir()
    checkpoint.prune(tmp_path, 6, 2, 3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000003", "step-00000005", "step-00000006"]


def test_damaged_ones_of_later_steps_cost_no_new_one_its_place(tmp_path: Path) -> None:
    for step in (50, 100):
        checkpoint.write(tmp_path, _checkpoint(step))
    (tmp_path / "step-00000100" / "adapter.safetensors").write_bytes(b"")
    for step in (60, 70):
        checkpoint.write(tmp_path, _checkpoint(step))
        checkpoint.prune(tmp_path, step, 1, None)
    found = checkpoint.newest(tmp_path, lambda _: None)
    assert found is not None and found.step == 70
    checkpoint.write(tmp_path, _checkpoint(100))
    checkpoint.prune(tmp_path, 100, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]


def test_unwritable_storage_is_a_clear_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="step 3 cannot be written"):
        checkpoint.write(blocked, _checkpoint(3))


def test_a_step_that_is_trained_again_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, _checkpoint(4))
    again = Checkpoint(4, _checkpoint(9).tensors, {"progress": {"step": 4}})
    checkpoint.write(tmp_path, again)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None and torch.equal(found.tensors["adapter"]["a"], torch.full((3,), 9.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
