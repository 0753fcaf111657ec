"""What a course through a job came to."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.errors import TrainingError
from orchestrator.training import course
from orchestrator.training.collective import World
from orchestrator.training.progress import Progress


def _course(folder: Path, progress: Progress) -> Any:
    engine = SimpleNamespace(base=SimpleNamespace(device=torch.device("cpu")))
    ground = SimpleNamespace(engine=engine, world=World())
    return SimpleNamespace(ground=ground, folder=folder, progress=progress)


def test_a_job_that_trained_no_step_has_no_results(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No step was trained") as caught:
        course.results(_course(tmp_path, Progress()))
    assert caught.value.exit_status == 1
    trained = Progress().stepped(loss=2.5, tokens=30, seconds=2.0)
    found = course.results(_course(tmp_path, trained))
    assert (found["steps"], found["tokens"], found["train_loss"]) == (1, 30, 2.5)
