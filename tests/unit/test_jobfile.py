"""Job files: what is read, what is refused, and in which words."""

from pathlib import Path

import pytest

from orchestrator.config import JobConfig
from orchestrator.errors import JobFileError
from orchestrator.identity import changed_keys
from orchestrator.jobfile import dump_job, job_from_mapping, load_job

GOOD = "name: bot\nmodel: {base: some/model}\ndata:\n  train: rows.jsonl\n"
JOBS = Path(__file__).parents[2] / "jobs"


def _load(tmp_path: Path, text: str, *overrides: str) -> JobConfig:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return load_job(path, overrides)


def test_defaults_file_and_overrides_in_that_order(tmp_path: Path) -> None:
    job = _load(tmp_path, GOOD + "lora: {rank: 8}\n", "lora.alpha=4", "lora.rank=2")
    assert (job.lora.rank, job.lora.alpha, job.lora.dropout) == (2, 4, 0.0)


def test_numbers_are_read_as_in_yaml_1_2(tmp_path: Path) -> None:
    job = _load(tmp_path, GOOD + "training: {learning_rate: 2e-4}\n")
    assert job.training.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("data.validation=null", "data", "validation", None),
        ("data.validation=0.2", "data", "validation", 0.2),
        ("data.validation=held.jsonl", "data", "validation", "held.jsonl"),
        ("data.train=[a.jsonl, b.jsonl]", "data", "train", ("a.jsonl", "b.jsonl")),
        ("lora.target_modules=[q_proj,v_proj]", "lora", "target_modules", ("q_proj", "v_proj")),
        ("training={max_steps: 5}", "training", "max_steps", 5),
        ("cluster.workers=[1, 4]", "cluster", "workers", (1, 4)),
        ("training.gradient_checkpointing=true", "training", "gradient_checkpointing", True),
        ("training.max_grad_norm=null", "training", "max_grad_norm", None),
    ],
)
def test_overrides(tmp_path: Path, override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(_load(tmp_path, GOOD, override), section), key) == value


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("lora: {rnak: 8}", 5, ["lora.rnak", "unknown key", "did you mean lora.rank?", "alpha"]),
        ("rank: 8", 5, ["rank", "did you mean lora.rank?"]),
        ("quantization:\n  type: nf5", 6, ["quantization.type", "nf4, fp4, none", "mean nf4?"]),
        ("lora: {rank: '16'}", 5, ["lora.rank", "is text", "without quotes"]),
        ("lora: {rank: true}", 5, ["lora.rank", "integer"]),
        ("lora: {dropout: 1.0}", 5, ["lora.dropout", "less than 1"]),
        ("training:\n\n  batch_size: 0", 7, ["training.batch_size", "0", "greater than 0"]),
        ("training: {learning_rate: .nan}", 5, ["training.learning_rate", "finite"]),
        ("training: {scheduler: cosin}", 5, ["did you mean cosine?"]),
        ("training: 5", 5, ["training", "mapping of keys"]),
        ("training: {max_steps: 5, warmup_steps: 9}", 1, ["warmup_steps (9)", "max_steps (5)"]),
        ("cluster: {workers: [4, 2]}", 5, ["cluster.workers", "[min, max]"]),
        ("cluster: {workers: 0}", 5, ["cluster.workers", "above 0"]),
        ("lora: {target_modules: q_proj}", 5, ["lora.target_modules", "all-linear"]),
        ("data: {train: a, validation: 1.5}", None, ["duplicate"]),
        ("sweep: {search_space: {lora.rank: {chioce: [1]}}}", 5, ["choice"]),
        ("lora: [1", None, ["expected"]),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, line: int | None, words: list[str]) -> None:
    with pytest.raises(JobFileError) as caught:
        _load(tmp_path, GOOD + text + "\n")
    message = str(caught.value)
    assert caught.value.exit_status == 2
    if line is not None:
        assert f"job.yaml:{line}: " in message or f"job.yaml:{line}\n" in message, message
    for word in words:
        assert word in message


def test_all_faults_at_once_in_order(tmp_path: Path) -> None:
    with pytest.raises(JobFileError) as caught:
        _load(tmp_path, "name: a/b\nlora: {rank: 0}\nnonsense: 1\n", "training.epochs=-1")
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    keys = ("name", "rank", "nonsense", "epochs", "model", "data")
    assert all(any(key in line for line in lines) for key in keys)
    assert lines[-1].startswith("--set training.epochs=-1: ")


@pytest.mark.parametrize("override", ["lora.rank", "=3", "lora.rnak=3", "lora.rank=[", "lora=1"])
def test_bad_overrides_are_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(JobFileError, match="--set"):
        _load(tmp_path, GOOD, override)


def test_a_password_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(JobFileError) as caught:
        _load(tmp_path, GOOD, "tracking.uri={a: secret-word}")
    assert "secret-word" not in str(caught.value)


def test_missing_empty_and_shapeless_files(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(GOOD)
    with pytest.raises(JobFileError, match=r"did you mean .*train\.yaml"):
        load_job(tmp_path / "trian.yaml")
    with pytest.raises(JobFileError, match="empty"):
        _load(tmp_path, "")
    with pytest.raises(JobFileError, match="mapping"):
        _load(tmp_path, "- a\n")


def test_a_mapping_obeys_the_same_checks() -> None:
    mapping = {"name": "a", "model": {"base": "b"}, "data": {"train": "c"}}
    assert job_from_mapping(mapping).lora.rank == 16
    with pytest.raises(JobFileError, match=r"lora\.rank"):
        job_from_mapping({**mapping, "lora": {"rnak": 1}})


def test_shipped_jobs_parse_and_survive_a_round_trip(tmp_path: Path) -> None:
    files = list(JOBS.rglob("*.yaml"))
    assert files
    for file in files:
        job = load_job(file)
        (tmp_path / "again.yaml").write_text(dump_job(job))
        assert load_job(tmp_path / "again.yaml") == job


def test_what_may_change_between_two_commands(tmp_path: Path) -> None:
    job = _load(tmp_path, GOOD)
    assert changed_keys(job, _load(tmp_path, GOOD, "training.max_steps=9")) == []
    assert changed_keys(job, _load(tmp_path, GOOD, "evaluation.every=9")) == []
    changed = changed_keys(job, _load(tmp_path, GOOD, "training.seed=9", "model.base=x"))
    assert changed == [("model.base", "some/model", "x"), ("training.seed", 0, 9)]
    cosine = _load(tmp_path, GOOD, "training.scheduler=cosine")
    longer = _load(tmp_path, GOOD, "training.scheduler=cosine", "training.epochs=9")
    assert [key for key, *_ in changed_keys(cosine, longer)] == ["training.epochs"]
