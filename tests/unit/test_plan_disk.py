"""What a job leaves on disk, how many steps it takes and how long, by the plan."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data import prepare
from orchestrator.data.dataset import DatasetWriter
from orchestrator.model.base import load_tokenizer
from orchestrator.plan import describe, plan_job, speed
from orchestrator.plan.disk import _EXAMPLE, _TOKEN
from orchestrator.plan.examples import Examples, count_examples
from tests import tiny
from tests.conftest import write_chats
from tests.unit.test_plan import GIB, make_job

BASE = "HuggingFaceTB/SmolLM2-135M"
# Of rank 16 on all its linear layers.
WEIGHTS = 4 * 4_884_480
# AdamW's state is two float32 of each.
CHECKPOINT = 3 * WEIGHTS


def disk(steps: int, gpus: int = 1, **sections: Any) -> dict[str, int]:
    training = {"max_steps": steps, "tokens_per_pass": 256, "gradient_checkpointing": True}
    plan = plan_job(make_job(BASE, training=training, **sections), 8 * GIB, gpus)
    assert plan.disk_bytes == sum(plan.details["disk"].values())
    return dict(plan.details["disk"])


def write_rows(path: Path, sizes: list[int]) -> str:
    """Rows of so many bytes each, the end of the line included."""
    lines = [json.dumps({"text": "x" * (size - len('{"text": ""}\n'))}) for size in sizes]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_a_fine_tune_keeps_its_newest_checkpoints_and_the_best() -> None:
    found = disk(1000)
    assert (found["checkpoints"], found["adapter"]) == (3 * CHECKPOINT, WEIGHTS)
    assert disk(60)["checkpoints"] == 2 * CHECKPOINT
    alone = disk(1000, data={"train": "x", "validation": None})
    assert alone["checkpoints"] == 2 * CHECKPOINT
    assert (found["shared_base"], found["data"]) == (0, 0)


def test_workers_of_several_nodes_keep_a_copy_of_the_base() -> None:
    found = disk(1000, gpus=2)
    assert found["shared_base"] == found["base_store"] > 0


@pytest.mark.parametrize(
    ("sweep", "trials"),
    [({"trials": 12}, 12), ({"trials": 50, "searcher": "grid", "concurrent": 2}, 6)],
)
def test_every_trial_of_a_sweep_keeps_its_own(sweep: dict[str, Any], trials: int) -> None:
    space = {
        "lora.rank": {"choice": [8, 16]},
        "training.learning_rate": {"choice": [1e-4, 2e-4, 4e-4]},
    }
    found = disk(1000, sweep={**sweep, "search_space": space})
    assert found["checkpoints"] == trials * 3 * CHECKPOINT
    assert found["adapter"] == (trials + 1) * WEIGHTS


def test_a_population_keeps_every_checkpoint() -> None:
    sweep = {
        "trials": 4,
        "scheduler": "pbt",
        "search_space": {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}},
    }
    found = disk(100, evaluation={"every": 10}, sweep=sweep)
    # At steps 10 to 100; those of checkpoint.every: 50 are among them.
    assert found["checkpoints"] == 4 * 10 * CHECKPOINT


def test_tokenized_rows_take_what_is_planned(tmp_path: Path) -> None:
    examples = tiny.examples([30, 40])
    with DatasetWriter(tmp_path) as writer:
        writer.extend(examples, [1, 2])
    held = sum(file.stat().st_size for file in tmp_path.glob("*.bin"))
    # The place of each example lies in a file of the training or the validation part.
    assert held + 2 * 8 == 70 * _TOKEN + 2 * _EXAMPLE


def counted(train: str | list[str], base: str = "no/such-model", share: float | None = None) -> Any:
    job = make_job(base, data={"train": train, "max_length": 200, "validation": share})
    return count_examples(job.data, job.model)


def test_rows_of_local_files_are_counted(tmp_path: Path) -> None:
    lines = write_rows(tmp_path / "a.jsonl", [100, 300, 50, 50])
    table = str(tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["one", "two"]}), table)
    assert counted(lines) == Examples(4, 400, "at most")
    assert counted(table) == Examples(2, 400, "at most")
    assert counted([lines, table]) == Examples(6, 800, "at most")
    assert counted(lines, share=0.25) == Examples(3, 300, "at most")
    (tmp_path / "c.csv").write_text("text\none\n")
    for unknown in ("owner/rows", str(tmp_path), [lines, str(tmp_path / "c.csv")]):
        assert counted(unknown) is None


def test_lengths_are_guessed_with_the_models_tokenizer(tmp_path: Path, chat_model: Path) -> None:
    rows = write_chats(tmp_path / "rows.jsonl", 200)
    found = counted(str(rows), str(chat_model))
    data = make_job(BASE, data={"train": str(rows), "max_length": 200, "validation": None}).data
    made = prepare(data, load_tokenizer(chat_model), tmp_path / "cache").train
    assert (found.count, found.sure) == (len(made), "about")
    assert found.tokens == pytest.approx(made.lengths.sum(), rel=0.5)


def test_the_time_is_that_of_all_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "product_rate", lambda *_: 1e12)
    base = str(tiny.save_model(tmp_path / "model"))
    rows = write_rows(tmp_path / "rows.jsonl", [50] * 40)
    data = {"train": rows, "max_length": 64, "validation": None}

    def timed(**sections: Any) -> tuple[Any, Any]:
        plan = plan_job(make_job(base, data=data, **sections))
        tokens = plan.details["seconds"] * plan.details["tokens_per_second"]
        assert plan.details["seconds_rest_on"] in describe(plan)
        return tokens, plan.details["seconds_rest_on"]

    training = {"epochs": 2, "batch_size": 4}
    tokens, rests_on = timed(training=training)
    assert tokens == pytest.approx(2 * 40 * 50)
    assert rests_on == "20 steps of 4 examples of at most 50 tokens"
    sweep = {"trials": 6, "search_space": {"lora.rank": {"choice": [4, 8]}}}
    tokens, rests_on = timed(training={**training, "max_steps": 5}, sweep=sweep)
    assert tokens == pytest.approx(6 * 5 * 4 * 50)
    assert rests_on == "at most 6 trials of 5 steps of 4 examples of at most 50 tokens"
    nowhere = plan_job(make_job(base, data={"train": "nowhere.jsonl", "max_length": 64}))
    assert nowhere.details["tokens_per_second"] and nowhere.details["seconds"] is None
