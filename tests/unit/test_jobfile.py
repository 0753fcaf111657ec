"""Job files: what is read, what is refused, and in which words."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator import config
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
        ("training.learning_rate=2e-4", "training", "learning_rate", 2e-4),
        ("cluster.gpus_per_worker=0.5", "cluster", "gpus_per_worker", 0.5),
        ("cluster.gpus_per_worker=1", "cluster", "gpus_per_worker", 1),
        ("cluster.gpus_per_worker=0", "cluster", "gpus_per_worker", 0),
        ("data.columns.the.question=Q", "data", "columns", {"the.question": "Q"}),
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
        ("every: 5", 5, ["did you mean evaluation.every or checkpoint.every?"]),
        ("training: {trials: 5}", 5, ["did you mean sweep.trials?", "allowed here: epochs"]),
        ("LORA: {rank: 3}", 5, ["did you mean lora?"]),
        ("training: {learning-rate: 1.0e-4}", 5, ["did you mean training.learning_rate?"]),
        ("lora.rank: 8", 5, ["write it nested, as lora: {rank: ...}"]),
        ("1: 2", 5, ["1: unknown key"]),
        ("zzzz: 2", 5, ["zzzz: unknown key; allowed here: name, output_dir"]),
        ("lora: {rank: '16'}", 5, ["lora.rank: '16' is text; give a whole number without quotes"]),
        ("lora: {rank: true}", 5, ["lora.rank: true is not allowed; give a whole number"]),
        ("lora: {rank: 1.5}", 5, ["lora.rank: 1.5 is not allowed; give a whole number"]),
        ("lora: {rslora: 'no'}", 5, ["lora.rslora: 'no' is text; give true or false"]),
        ("cluster: {address: 5}", 5, ["cluster.address: 5 is not text; put it in quotes"]),
        ("cluster: {address: 2024-01-01}", 5, ["2024-01-01 is not text; put it in quotes"]),
        ("cluster: {address: !x 5}", 5, ["cluster.address: a tagged value is not allowed"]),
        ("cluster: {address: }", 5, ["cluster.address: null is not allowed; give text"]),
        ("cluster: {gpus_per_worker: .inf}", 5, ["number of GPUs"]),
        ("cluster: {gpus_per_worker: 2}", 5, ["trains on one; take more workers"]),
        ("tracking: {experiment: ''}", 5, ["tracking.experiment", "at least 1 character"]),
        ("lora: {dropout: 1.0}", 5, ["lora.dropout", "less than 1"]),
        ("training:\n\n  batch_size: 0", 7, ["training.batch_size", "0", "greater than 0"]),
        ("training: {learning_rate: .nan}", 5, ["training.learning_rate", "finite"]),
        ("training: {scheduler: cosin}", 5, ["did you mean cosine?"]),
        (
            "training: 5",
            5,
            ["training: 5 is not allowed; training takes a mapping of keys: epochs"],
        ),
        ("lora:", 5, ["lora: null is not allowed; lora takes a mapping of keys: rank, alpha"]),
        ("training: {max_steps: 5, warmup_steps: 9}", 5, ["warmup_steps: 9", "max_steps (5)"]),
        ("x: &d {evry: 5}\nevaluation:\n  <<: *d", 6, ["evaluation.evry", "evaluation.every?"]),
        ("cluster: {workers: [4, 2]}", 5, ["cluster.workers", "[min, max]"]),
        ("cluster: {workers: 0}", 5, ["cluster.workers", "above 0"]),
        ("lora: {target_modules: q_proj}", 5, ["lora.target_modules", "all-linear"]),
        ("data: {train: a, validation: 1.5}", None, ["job.yaml:5:1: ", "duplicate key"]),
        ("sweep: {search_space: {lora.rank: {chioce: [1]}}}", 5, ["choice"]),
        ("lora: [1", None, ["job.yaml:6:1: ", "expected"]),
        ("lora:\n\trank: 3", None, ["job.yaml:6:1: ", "cannot start any token"]),
        ("lora: \x00", None, ["job.yaml:5:7: ", "not allowed"]),
        ("---\nname: b", None, ["job.yaml:5:1: ", "another document"]),
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


def test_missing_keys_are_named_at_their_section(tmp_path: Path) -> None:
    with pytest.raises(JobFileError) as caught:
        _load(tmp_path, "# a comment\nname: bot\n\nmodel:\n  revision: main\ndata: {}\n")
    model, data = str(caught.value).splitlines()
    assert "job.yaml:4: model.base: missing; give a hub id" in model
    assert "job.yaml:6: data.train: missing; give file(s)" in data


def test_keys_of_a_free_mapping_have_lines_too(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"job\.yaml:7: data\.columns\.answer: 5 is not text"):
        _load(tmp_path, GOOD + "  columns:\n    question: Q\n    answer: 5\n")


def test_anchored_values_keep_their_types(tmp_path: Path) -> None:
    text = "lora: {rslora: &yes true}\ntraining: {gradient_checkpointing: *yes, seed: 0x10}\n"
    job = _load(tmp_path, GOOD + text)
    assert (job.lora.rslora, job.training.gradient_checkpointing) == (True, True)
    assert job.training.seed == 16


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.rank", "give KEY=VALUE"),
        ("=3", "give KEY=VALUE"),
        ("lora..rank=3", "give KEY=VALUE"),
        ("lora.rnak=3", "did you mean lora.rank?"),
        ("traking.uri=a", "did you mean tracking?"),
        ("lora.rank=[", "not valid YAML"),
        ("training={epochs: 1, epochs: 2}", 'duplicate key "epochs"'),
        ("lora=1", "takes a mapping of keys"),
        ("lora.rank.x=3", "give a whole number"),
        ("data.train.x=3", "data.train holds a value"),
        ("lora.rank=", "null is not allowed"),
        ("data.validation=false", "give a share"),
        ('name="a\\nb"', "no line breaks"),
        ("name=mlflow.db", "kept for other things"),
        ("name=.bases", "kept for other things"),
        ("tracking.registered_model=me/bot", "without / and :"),
        ("tracking.registered_model=''", "without / and :"),
        ("sweep.search_space={training.weight_decay: {loguniform: [0, 0.1]}}", "above 0"),
        ("sweep.search_space={training.warmup_steps: {logint: [0, 8]}}", "above 0"),
    ],
)
def test_bad_overrides_are_named(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(JobFileError) as caught:
        _load(tmp_path, GOOD, override)
    message = str(caught.value)
    assert message.startswith("--set ") and words in message, message
    assert "\n" not in message


@pytest.mark.parametrize("section", ["", "lora:\n", "lora: null\n", "lora: {alpha: 4}\n"])
def test_an_override_makes_the_section_it_needs(tmp_path: Path, section: str) -> None:
    assert _load(tmp_path, GOOD + section, "lora.rank=3").lora.rank == 3


def test_an_override_does_not_cover_up_a_broken_section(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"job\.yaml:5: training: 5 is not allowed"):
        _load(tmp_path, GOOD + "training: 5\n", "training.epochs=1")


def test_the_later_override_is_blamed(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"^--set lora=\{rank: 0\}: lora\.rank: 0"):
        _load(tmp_path, GOOD, "lora.rank=8", "lora={rank: 0}")


URI = "https://ann:s3cret@host/x"


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (f"tracking: '{URI}'", []),
        (f"tracking: ['{URI}']", []),
        (f"tracking: {{uri: ['{URI}']}}", []),
        ("tracking: {uri: ['ann:s3cret']}", []),
        (f"tracking: {{uri: '{URI}', uri: b}}", []),
        ("tracking: {uri: 'ann:s3cret', uri: b}", []),
        (f"tracking: {{experiment: [{URI}]}}", []),
        (f"tracking: {{? '{URI}' : 1}}", []),
        (f"tracking: {{? '{URI}' : 1, ? '{URI}' : 2}}", []),
        (f"tracking: *{URI}", []),
        (f"tracking: !{URI} x", []),
        (f"lora: {{rank: '{URI}'}}", []),
        ("", [f"tracking={URI}"]),
        ("", ["tracking.uri={a: s3cret}"]),
        ("", [f"tracking.url={URI}"]),
        ("", [f"traking.uri={URI}"]),
        ("", ["traking.uri=ann:s3cret"]),
        ("", ["uri=ann:s3cret"]),
        ("", [f"tracking.uri={URI}: ["]),
        ("", [f"tracking.uri {URI}"]),
        ("", [f"tracking.uri:{URI}"]),
        ("", [f"tracking={{uri: '{URI}', uri: 2}}"]),
        ("tracking: 5", [f"tracking.uri={URI}"]),
    ],
)
def test_a_password_is_not_repeated(tmp_path: Path, text: str, overrides: list[str]) -> None:
    with pytest.raises(JobFileError) as caught:
        _load(tmp_path, GOOD + text + "\n", *overrides)
    assert "s3cret" not in str(caught.value)


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
    assert job_from_mapping({**mapping, "data": {"train": Path("rows.jsonl")}}).data.train
    with pytest.raises(JobFileError, match=r"^job: lora\.rnak: unknown key; .* lora\.rank\?"):
        job_from_mapping({**mapping, "lora": {"rnak": 1}})


def test_shipped_jobs_parse_and_survive_a_round_trip(tmp_path: Path) -> None:
    files = list((JOBS / "examples").rglob("*.yaml"))
    assert files
    for file in files:
        job = load_job(file)
        (tmp_path / "again.yaml").write_text(dump_job(job))
        assert load_job(tmp_path / "again.yaml") == job


def test_the_job_file_of_the_readme_is_one(tmp_path: Path) -> None:
    text = (JOBS.parent / "README.md").read_text()
    job, sweep = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert _load(tmp_path, job + sweep).sweep is not None


def test_every_key_says_what_it_means() -> None:
    sections = [kind for kind in vars(config).values() if isinstance(kind, type(JobConfig))]
    silent = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if field.description is None and "Config" not in str(field.annotation)
    ]
    assert len(sections) > 8 and silent == []


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80)


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, st.floats(1e-30, 1e30), st.dictionaries(TEXTS, TEXTS, max_size=3))
@example("0", "0", 1.0, {"0" * 20 + "\x1f" * 9 + "\x06": "0\x1f\x1f\x7f0 0"})
def test_any_job_survives_a_round_trip(
    base: str, train: str, rate: float, columns: dict[str, str]
) -> None:
    mapping = {
        "name": "a",
        "model": {"base": base},
        "data": {"train": train, "columns": columns},
        "training": {"learning_rate": rate},
        "cluster": {"workers": (1, 4)},
    }
    job = job_from_mapping(mapping)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(dump_job(job), encoding="utf-8")
        assert load_job(path) == job


def test_what_may_change_between_two_commands(tmp_path: Path) -> None:
    job = _load(tmp_path, GOOD)
    assert changed_keys(job, _load(tmp_path, GOOD, "training.max_steps=9")) == []
    assert changed_keys(job, _load(tmp_path, GOOD, "evaluation.every=9")) == []
    changed = changed_keys(job, _load(tmp_path, GOOD, "training.seed=9", "model.base=x"))
    assert changed == [("model.base", "some/model", "x"), ("training.seed", 0, 9)]
    cosine = _load(tmp_path, GOOD, "training.scheduler=cosine")
    longer = _load(tmp_path, GOOD, "training.scheduler=cosine", "training.epochs=9")
    assert [key for key, *_ in changed_keys(cosine, longer)] == ["training.epochs"]
