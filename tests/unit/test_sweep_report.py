"""The report of a sweep, from journals as trials leave them."""

import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from orchestrator.config import JobConfig
from orchestrator.sweep.finish import conclude, results, settle
from orchestrator.sweep.outcome import Outcome, best_trial, outcomes
from orchestrator.sweep.report import write_report
from orchestrator.sweep.report.dimension import across, dimensions
from orchestrator.sweep.report.importance import importance
from orchestrator.sweep.report.page import Winner, render
from orchestrator.sweep.report.pictures import drawn
from orchestrator.sweep.report.table import mlflow_table
from orchestrator.sweep.words import metric_name
from orchestrator.tracking.journal import journal_path, read_events
from tests.unit.sweeps import SPACE, Trained, sweep_job, write_trials

NAN = math.nan
MIXED = [
    Trained({"lora.rank": 4, "training.learning_rate": 1e-3}, [4, 3, 3, 2, 2, 1.5]),
    Trained({"lora.rank": 8, "training.learning_rate": 1e-2}, [4, 3.5], "stopped"),
    Trained({"lora.rank": 16, "training.learning_rate": 2e-3}, [4, 3, 2, 2, 2, 1.2]),
    Trained({"lora.rank": 32, "training.learning_rate": 5e-3}, [4, 9, NAN], "failed", "it is nan"),
    Trained({"lora.rank": 4, "training.learning_rate": 3e-4}, [], "failed", "no such layer"),
    Trained({"lora.rank": 8, "training.learning_rate": 4e-4}, [4, 3, 3, 3, 3, NAN]),
]
PICTURES = ["loss_curves", "eval_loss_over_learning_rate", "parallel_coordinates", "importance"]


class _Page(HTMLParser):
    """The tags, links and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def _parsed(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    return page


def _best(found: Sequence[Outcome]) -> Outcome | None:
    return best_trial(list(found), "eval_loss", "min")


def _report(job: JobConfig, found: Sequence[Outcome]) -> Path:
    best = _best(found)
    winner = best and Winner(best, "name: search-best\n", "runs/search/adapter", "7")
    return write_report(job, job.run_dir / "report", found, winner, 90.0)


def _names(job: JobConfig, found: Sequence[Outcome]) -> list[str]:
    assert job.sweep is not None
    return [name for name, *_ in drawn(job.sweep, found, _best(found))]


def test_outcomes_tell_how_trials_ended(tmp_path: Path) -> None:
    trials = [
        *MIXED,
        Trained({"lora.rank": 4, "training.learning_rate": 1e-3}, [4, 3], None),
        Trained({"lora.rank": 4, "training.learning_rate": 1e-3}, joined=False),
    ]
    found = outcomes(write_trials(sweep_job(tmp_path), trials))
    states = ["finished", "stopped", "finished", "failed", "failed", "finished"]
    assert [o.status for o in found] == [*states, "running", "waiting"]
    assert [o.eval_loss for o in found[:5]] == [1.5, 3.5, 1.2, 9, None]
    assert math.isnan(found[5].eval_loss or 0)
    assert [o.steps for o in found] == [6, 2, 6, 3, 0, 6, 2, 0]
    assert found[0].seconds == 3.0 and found[0].tokens == 600 and found[0].total_steps == 6
    # The smallest loss that is a number.
    assert _best(found) is found[2]


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    job = sweep_job(tmp_path)
    found = outcomes(write_trials(job, MIXED))
    path = _report(job, found)
    text = path.read_text()
    page = _parsed(text)
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert "url(http" not in text and "@import" not in text and "link" not in page.tags
    assert page.tags.count("svg") == 4 and page.tags.count("table") == 1
    for shown in ("1.2000", "stopped early", "it is nan", "runs/search/adapter", "version 7"):
        assert shown in page.text
    assert page.text.count("(best)") == 1 and "name: search-best" in page.text
    assert "0.0001 to 0.01, evenly by its logarithm" in page.text
    for name in PICTURES:
        with Image.open(path.parent / f"{name}.png") as picture:
            assert picture.width > 1000


def test_the_table_is_mlflows(tmp_path: Path) -> None:
    job = sweep_job(tmp_path)
    _report(job, outcomes(write_trials(job, MIXED)))
    # MLflow's UI reads strict JSON: no NaN.
    table = json.loads((job.run_dir / "report" / "trials.json").read_text(), parse_constant=_refuse)
    rows = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert [row["trial_id"][-1] for row in rows] == ["2", "0", "5", "1", "3", "4"]
    assert rows[0]["lora.rank"] == 16 and rows[0]["eval_loss"] == 1.2
    assert rows[2]["eval_loss"] is None and rows[2]["status"] == "finished"


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_values_names_and_errors_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "<script>alert('x')</script>"
    monkeypatch.setenv("MY_API_TOKEN", "swordfish99")
    space = {"lora.target_modules": {"choice": [[evil], ["q_proj", "swordfish99"], ["$x^$"]]}}
    job = sweep_job(tmp_path, space).model_copy(update={"name": f"a&b {evil[:8]}"})
    keys = [{"lora.target_modules": value} for value in space["lora.target_modules"]["choice"]]
    found = outcomes(
        write_trials(
            job,
            [
                Trained(keys[0], [4, 3, 3, 3, 3, 2]),
                Trained(keys[1], [4, 3, 3, 3, 3, 1]),
                Trained(keys[2], [4], "failed", f"{evil} with swordfish99"),
            ],
        )
    )
    text = _report(job, found).read_text()
    page = _parsed(text)
    assert page.tags.count("script") == 1 and "alert('x')" not in text.split("<script>")[1]
    assert evil in page.text and "$x^$" in page.text and f"a&b {evil[:8]}" in page.text
    assert "swordfish99" not in text and "q_proj, ***" in page.text


@pytest.mark.parametrize(
    ("trials", "pictures"),
    [
        (MIXED[:1], PICTURES[:3]),
        (MIXED[3:5], PICTURES[:1]),
        (MIXED[4:5], []),
        ([MIXED[1]], PICTURES[:3]),
        ([Trained(MIXED[0].params, joined=False)], []),
        ([Trained(MIXED[0].params, [NAN], "failed", "nan")], PICTURES[:1]),
        (MIXED[:1] * 3, PICTURES[:3]),
    ],
    ids=["one", "failed", "before a step", "stopped", "never begun", "nan at once", "all alike"],
)
def test_few_trials_have_the_pictures_there_are(
    tmp_path: Path, trials: list[Trained], pictures: list[str]
) -> None:
    job = sweep_job(tmp_path)
    found = outcomes(write_trials(job, trials))
    assert _names(job, found) == pictures
    best = _best(found)
    winner = best and Winner(best, "name: search-best", "adapter", None)
    text, nobody = _parsed(render(job, found, winner, [], 90.0)).text, best is None
    assert ("No trial was trained to its end" in text) is nobody


@pytest.mark.parametrize("count", [2, 60])
def test_pictures_of_many_keys_and_kinds(tmp_path: Path, count: int) -> None:
    space = {
        "lora.rank": {"int": [1, 64]},
        "lora.dropout": {"uniform": [0.0, 0.3]},
        "lora.rslora": {"choice": [True, False]},
        "training.scheduler": {"choice": ["constant", "linear", "cosine"]},
        "training.max_grad_norm": {"choice": [None, 0.3]},
    }
    job = sweep_job(tmp_path, space)
    trials = [
        Trained(
            {
                "lora.rank": 1 + place % 64,
                "lora.dropout": place / 200,
                "lora.rslora": place % 2 == 0,
                "training.scheduler": ["constant", "linear", "cosine"][place % 3],
                "training.max_grad_norm": None if place % 2 else 0.3,
            },
            [4, 3, 3, 3, 3, 2 + place / 10],
        )
        for place in range(count)
    ]
    found = outcomes(write_trials(job, trials))
    names = _names(job, found)
    assert names == ["loss_curves", "eval_loss_over_dropout", *PICTURES[2:]]
    page = _report(job, found).read_text()
    for start in [at for at in range(len(page)) if page.startswith("<svg", at)]:
        svg = page[start : page.index("</svg>", start) + 6]
        ElementTree.fromstring(svg)
    assert all(shown in page for shown in ("cosine", "rslora", "null"))


def test_the_learning_rate_is_the_axis_and_its_scale_logarithmic(tmp_path: Path) -> None:
    space = {"lora.dropout": {"uniform": [0.0, 0.5]}, **SPACE}
    job = sweep_job(tmp_path, space)
    params = {"lora.dropout": 0.1, "lora.rank": 4, "training.learning_rate": 1e-3}
    other = {"lora.dropout": 0.2, "lora.rank": 32, "training.learning_rate": 1e-4}
    found = outcomes(write_trials(job, [Trained(params, [3] * 6), Trained(other, [2] * 6)]))
    assert job.sweep is not None
    axes = dimensions(job.sweep, found)
    over, by = across(axes)
    assert over is not None and over.label == "learning_rate" and over.log
    assert by is not None and by.label == "dropout" and not by.log
    assert axes[1].log and axes[1].listed


@pytest.mark.parametrize(
    ("metric", "mode", "first"),
    [("perplexity", "min", "2"), ("train_loss", "max", "0"), ("tokens_per_second", "max", "0")],
)
def test_other_metrics(tmp_path: Path, metric: str, mode: str, first: str) -> None:
    job = sweep_job(tmp_path, metric=metric, mode=mode)
    assert job.sweep is not None
    found = outcomes(write_trials(job, MIXED))
    best = best_trial(found, metric, mode)
    names = [name for name, *_ in drawn(job.sweep, found, best)]
    assert names[1] == f"{metric}_over_learning_rate"
    # All trials are equally fast: nothing mattered.
    assert (names[-1] == "importance") is (metric != "tokens_per_second")
    table = mlflow_table(found, (), metric, mode)
    assert table["data"][0][0].endswith(first)
    page = _parsed(render(job, found, best and Winner(best, "", "", None), [], 90.0))
    assert f"Best {metric_name(metric)}" in page.text


def test_importance_finds_what_mattered(tmp_path: Path) -> None:
    job = sweep_job(tmp_path)
    assert job.sweep is not None
    trials = []
    for place in range(24):
        rank, rate = [4, 8, 16, 32][place % 4], 1e-4 * 100 ** ((place * 7 % 24) / 23)
        loss = 2 + (math.log10(rate) + 3) ** 2 + 0.01 * place % 4
        params = {"lora.rank": rank, "training.learning_rate": rate}
        if place % 3:
            # Worse for having been stopped, not for its rank.
            trials.append(Trained(params, [5, loss], "stopped"))
        else:
            trials.append(Trained(params, [5, loss, 1, 1, 1, 0.5 + place / 100]))
    found = outcomes(write_trials(job, trials))
    weights = importance(dimensions(job.sweep, found), found, "eval_loss")
    assert weights is not None and (weights.step, weights.trials) == (2, 24)
    assert sum(weights.shares.values()) == pytest.approx(1)
    assert weights.shares["training.learning_rate"] > 0.8
    assert weights == importance(dimensions(job.sweep, found), found, "eval_loss")


def test_importance_of_one_key_and_of_points_outside_the_space(tmp_path: Path) -> None:
    job = sweep_job(tmp_path, {"training.learning_rate": {"loguniform": [1e-4, 1e-3]}})
    assert job.sweep is not None
    rates = [1e-5, 1e-4, 5e-4, 1e-2]
    trials = [Trained({"training.learning_rate": rate}, [4, rate * 100]) for rate in rates]
    found = outcomes(write_trials(job, trials))
    weights = importance(dimensions(job.sweep, found), found, "eval_loss")
    assert weights is not None and weights.shares == {"training.learning_rate": 1.0}


class _Said:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))


def _with_adapters(job: JobConfig) -> None:
    for folder in (job.run_dir / "trials").iterdir():
        (folder / "adapter").mkdir()
        (folder / "adapter" / "name").write_text(folder.name)


def test_the_end_puts_the_best_in_the_sweeps_folder(tmp_path: Path) -> None:
    job, said = sweep_job(tmp_path), _Said()
    write_trials(job, MIXED)
    _with_adapters(job)
    conclude(job, job.run_dir, {"proof": {"relative_error": 0.0}}, said, lambda: "3")
    assert (job.run_dir / "adapter" / "name").read_text() == "abc_00002"
    events = dict(said.events)
    assert events["best"]["params"] == {"lora.rank": 16, "training.learning_rate": 2e-3}
    assert events["trials"] == {"finished": 3, "stopped": 1, "failed": 2, "tokens": 2300}
    assert events["files"]["tables"] == ["trials.json"]
    found = results(job, job.run_dir, "finished", 9.0, "run", "3")
    json.loads(json.dumps(found), parse_constant=_refuse)
    assert set(found) == {
        "status", "name", "run_id", "seconds", "trials", "best", "adapter", "report",
        "model_version",
    }  # fmt: skip
    fields = {
        "trial_id", "run_id", "params", "status", "steps", "eval_loss", "perplexity", "train_loss",
        "tokens", "tokens_per_second", "seconds", "error",
    }  # fmt: skip
    assert all(set(trial) == fields for trial in found["trials"])
    assert set(found["best"]) == fields | {"job"}
    assert Path(found["report"]).name == "report.html" and Path(found["report"]).exists()
    assert "searched, version 3" in Path(found["report"]).read_text()
    text = Path(found["best"]["job"]).read_text()
    assert text.startswith("# The sweep's best trial, abc_00002: eval loss 1.2000 after 6 steps.")


def test_the_best_job_file_is_one_that_finetune_reads(tmp_path: Path) -> None:
    from orchestrator.jobfile import load_job

    job = sweep_job(tmp_path)
    write_trials(job, MIXED)
    _with_adapters(job)
    conclude(job, job.run_dir, {}, _Said(), lambda: None)
    best = load_job(job.run_dir / "best.yaml")
    assert (best.name, best.sweep) == ("search-best", None)
    assert (best.lora.rank, best.training.learning_rate) == (16, 2e-3)
    kept = ("model", "data", "evaluation", "checkpoint", "tracking", "output_dir")
    assert all(getattr(best, name) == getattr(job, name) for name in kept)


def test_the_best_job_file_names_the_store_without_an_account(tmp_path: Path) -> None:
    from orchestrator.jobfile import load_job

    job = sweep_job(tmp_path)
    tracking = job.tracking.model_copy(update={"uri": "http://user:swordfish@host:5000/a"})
    job = job.model_copy(update={"tracking": tracking})
    write_trials(job, MIXED)
    _with_adapters(job)
    conclude(job, job.run_dir, {}, _Said(), lambda: None)
    assert load_job(job.run_dir / "best.yaml").tracking.uri == "http://host:5000/a"


def test_a_sweep_without_a_finished_trial_has_a_report(tmp_path: Path) -> None:
    from orchestrator.errors import OrchestratorError

    job, said = sweep_job(tmp_path), _Said()
    write_trials(job, [MIXED[1], MIXED[4]])
    with pytest.raises(OrchestratorError, match=r"None of 2 trials.*no such layer"):
        conclude(job, job.run_dir, {}, said, lambda: None)
    assert (job.run_dir / "report" / "report.html").exists()
    assert [event for event, _ in said.events] == ["trials", "files"]


def test_trials_that_the_end_came_before_get_their_last_word(tmp_path: Path) -> None:
    job = sweep_job(tmp_path)
    params = MIXED[0].params
    folder = write_trials(
        job, [MIXED[0], Trained(params, [4, 3], None), Trained(params, joined=False)]
    )
    whole = [line for line, _ in read_events(journal_path(folder / "abc_00000"))]
    settle(job.run_dir, "interrupted")
    settle(job.run_dir, "stopped")
    assert [line for line, _ in read_events(journal_path(folder / "abc_00000"))] == whole
    assert [o.status for o in outcomes(folder)] == ["finished", "interrupted", "interrupted"]
    last = [event for event, _ in read_events(journal_path(folder / "abc_00001"))][-1]
    assert (last["event"], last["steps"], last["tokens"]) == ("finish", 2, 200)
