"""What a run's folder holds decides whether a job may go on there."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import JobConfig
from orchestrator.errors import RefusedError
from orchestrator.jobfile import dump_job, job_from_mapping
from orchestrator.kept import check_run, check_sweep
from orchestrator.storage.place import Place
from orchestrator.tracking.journal import Journal, journal_path


def _job(folder: Path, **sections: Any) -> JobConfig:
    sweep = {"search_space": {"lora.rank": {"choice": [4, 8]}}, "trials": 2}
    content: dict[str, Any] = {
        "name": "a",
        "output_dir": str(folder),
        "model": {"base": "b"},
        "data": {"train": "t.jsonl"},
        "training": {"max_steps": 20},
        "sweep": {**sweep, **sections.pop("sweep", {})},
    }
    return job_from_mapping({**content, **sections})


def _begun(job: JobConfig, *, step: bool = False, trials: bool = False) -> JobConfig:
    """A command over the job that was killed."""
    job.run_dir.mkdir(parents=True)
    (job.run_dir / "job.yaml").write_text(dump_job(job))
    if trials:
        (job.run_dir / "trials").mkdir()
    with Journal(journal_path(job.run_dir)) as journal:
        journal.append("start", resumed_from=0)
        if step:
            journal.append("step", step=1, loss=1.0)
    return job


def test_a_job_that_changed_before_its_first_checkpoint_is_refused(tmp_path: Path) -> None:
    """Its journal has steps, which stand there once."""
    job = _begun(_job(tmp_path), step=True)
    check_run(job, Place(job.run_dir))
    check_run(_job(tmp_path, sweep={"trials": 9}), Place(job.run_dir))
    with pytest.raises(RefusedError, match=r"lora\.rank was 16, is now 2.*another name"):
        check_run(_job(tmp_path, lora={"rank": 2}), Place(job.run_dir))


def test_fewer_steps_than_were_trained_are_refused(tmp_path: Path) -> None:
    job = _begun(_job(tmp_path), step=True)
    with Journal(journal_path(job.run_dir)) as journal:
        journal.append("step", step=9, loss=1.0)
    check_run(_job(tmp_path, training={"max_steps": 9}), Place(job.run_dir))
    with pytest.raises(RefusedError, match=r"max_steps is 8, but .* has trained 9 steps"):
        check_run(_job(tmp_path, training={"max_steps": 8}), Place(job.run_dir))


def test_the_home_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    job = _job(tmp_path).model_copy(update={"output_dir": "~/runs"})
    assert job.run_dir == tmp_path / "runs" / "a"


def test_a_job_that_changed_before_its_first_step_goes_on(tmp_path: Path) -> None:
    job = _begun(_job(tmp_path))
    check_run(_job(tmp_path, lora={"rank": 2}), Place(job.run_dir))


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"sweep": {"trials": 9}}, "sweep.trials"),
        ({"sweep": {"search_space": {"lora.rank": {"choice": [4]}}}}, "sweep.search_space"),
        ({"training": {"max_steps": 30}}, "training.max_steps"),
        ({"evaluation": {"every": 7}}, "evaluation.every"),
        ({"lora": {"alpha": 1.0}}, "lora.alpha"),
    ],
)
def test_a_sweep_that_changed_is_refused(
    tmp_path: Path, sections: dict[str, Any], key: str
) -> None:
    job = _begun(_job(tmp_path), trials=True)
    check_sweep(job, job.run_dir)
    check_sweep(_job(tmp_path, cluster={"workers": 1}), job.run_dir)
    check_sweep(_job(tmp_path, sweep={"concurrent": 1}), job.run_dir)
    with pytest.raises(RefusedError, match=rf"{key}.* was .*another name"):
        check_sweep(_job(tmp_path, **sections), job.run_dir)


def test_a_fine_tune_and_a_sweep_do_not_share_a_folder(tmp_path: Path) -> None:
    swept = _begun(_job(tmp_path / "swept"), trials=True)
    with pytest.raises(RefusedError, match=r"holds a sweep of this name.*name=a-fine-tune"):
        check_run(swept, Place(swept.run_dir))
    tuned = _begun(_job(tmp_path / "tuned"), step=True)
    with pytest.raises(RefusedError, match=r"holds a fine-tune of this name.*name=a-sweep"):
        check_sweep(tuned, tuned.run_dir)
