"""Runs under a real limit on memory: refused beforehand, within it, or with a smaller budget."""

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from orchestrator.allocator import settings
from orchestrator.config import LoraConfig, TrainingConfig
from orchestrator.model.adapters import AdapterSet
from orchestrator.training.collective import World
from orchestrator.training.engine import Engine
from orchestrator.training.rows import Segment
from orchestrator.training.tenant import Tenant
from tests import tiny
from tests.conftest import make_tokenizer, write_job
from tests.integration.conftest import Commands, curve, journal

pytestmark = pytest.mark.memory

MIB = 2**20
# A run without a limit, which imports all there is to import; then a limit on the address space,
# and the command. `late`: the limit comes when the plan is made and training begins.
LIMITED = """
import resource, sys
import psutil
from orchestrator.cli import main
from orchestrator.tracking.observer import JournalObserver

warm_up, room, late, *command = sys.argv[1:]
main(["finetune", warm_up, "--local"], standalone_mode=False)

def limit():
    most = psutil.Process().memory_info().vms + int(room)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

def emit_and_limit(self, event, emit=JournalObserver.emit, **fields):
    emit(self, event, **fields)
    if event == "start":
        limit()

if late == "late":
    JournalObserver.emit = emit_and_limit
else:
    limit()
main(command)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of 16 examples of 256 tokens a step, over a model whose activations are large."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("limited")
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    words = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": None}
    tiny.save_model(folder / "model", LlamaConfig(**{**tiny.COMMON, **shape, **words}))
    tokenizer.save_pretrained(folder / "model")
    with (folder / "texts.jsonl").open("w") as stream:
        for number in range(40):
            stream.write(json.dumps({"text": f"{number} cat dog bird " * 32}) + "\n")
    return folder


_NUMBERS = count()


def job(folder: Path, name: str, **training: Any) -> Path:
    return write_job(
        folder,
        folder / "model",
        name,
        data={"train": str(folder / "texts.jsonl"), "max_length": 256, "train_on": "all"},
        training={"max_steps": 2, "batch_size": 16, "gradient_checkpointing": False, **training},
        evaluation={"samples": 0},
    )


def run_limited(commands: Commands, room: int, when: str, *arguments: object) -> Any:
    folder = Path(str(arguments[1])).parent
    warm_up = job(folder, f"warm-up-{next(_NUMBERS)}", max_steps=1, batch_size=1)
    program = [sys.executable, "-c", LIMITED, str(warm_up), str(room * MIB), when]
    return commands.wait(commands.start(*arguments, program=program, **settings({})))


def test_what_does_not_fit_is_refused_and_runs_as_advised(commands: Commands, folder: Path) -> None:
    path = job(folder, "refused", tokens_per_pass=4096)
    run = folder / "runs" / "refused"
    refused = run_limited(commands, 450, "early", "finetune", path, "--local", "--json")
    assert refused.status == 2, refused.err
    error = refused.result["error"]
    assert "does not fit" in error and "--set training.gradient_checkpointing=true" in error
    assert not (run / "checkpoints").exists()
    (plan,) = [event for event in journal(run) if event["event"] == "plan"]
    assert not plan["fits"] and plan["per_gpu_bytes"]["total"] > plan["gpu_bytes"]
    advised = error[error.index("--set") :].split()
    ended = run_limited(commands, 450, "early", "finetune", path, "--local", "--json", *advised)
    assert ended.status == 0, ended.err
    assert "Out of memory" not in ended.err


def test_what_fits_ends_well(commands: Commands, folder: Path) -> None:
    """`auto` takes what the limit leaves, and no more."""
    path = job(folder, "fits", tokens_per_pass="auto")
    ended = run_limited(commands, 200, "early", "finetune", path, "--local", "--json")
    assert ended.status == 0, ended.err
    assert "Out of memory" not in ended.err
    (plan,) = [e for e in journal(folder / "runs" / "fits") if e["event"] == "plan"]
    assert plan["fits"] and plan["tokens_per_pass"] < 1024
    assert ended.result["peak_memory_bytes"] < 1.1 * plan["gpu_bytes"]


def test_memory_that_runs_out_changes_nothing(commands: Commands, folder: Path) -> None:
    whole, limited = (job(folder, name, tokens_per_pass=4096) for name in ("whole", "limited"))
    assert commands.run("finetune", whole, "--local").status == 0
    ended = run_limited(commands, 150, "late", "finetune", limited, "--local", "--json")
    assert ended.status == 0, ended.err
    assert "Out of memory: from here on a pass takes at most" in ended.err
    run = folder / "runs" / "limited"
    budgets = [event for event in journal(run) if event["event"] == "budget"]
    assert budgets[0]["before"] == 4096 and budgets[-1]["tokens_per_pass"] < 2048
    found, wanted = curve(run), curve(folder / "runs" / "whole")
    assert [step for step, *_ in found] == [1, 2]
    for (_, loss, norm), (_, other, other_norm) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(other, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)


LENGTHS = (37, 5, 64, 12, 50, 8, 20, 41)


def _train(rank: int, size: int, refused: int | None, folder: Path) -> None:
    """One worker's two steps; the allocator refuses once, in the worker `refused`."""
    torch.set_num_threads(1)
    world = World()
    if size > 1:
        store = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        world = World(rank, size)
    base = tiny.load_base(folder / "base")
    adapters, told, training = AdapterSet(base.model), [], TrainingConfig(learning_rate=5e-3)
    tenant = Tenant(adapters.add(LoraConfig(rank=4), 0), training, 2)
    engine = Engine(base, adapters, world, 512, lambda *change: told.append(change))
    calls = 0

    def refuse(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if rank == refused and calls == 1:
            torch.empty(2**60, dtype=torch.uint8)

    base.decoder.layers[-1].register_forward_hook(refuse)
    steps = []
    for number in range(2):
        examples = tiny.examples(LENGTHS, number)
        batch = [Segment(0, number * 10 + n, example) for n, example in enumerate(examples)]
        (result,) = engine.step([tenant], [batch], [number + 1])
        assert result.update is not None
        steps.append((result.loss, result.update.gradient_norm))
    (folder / f"{size}-{rank}.json").write_text(json.dumps({"steps": steps, "told": told}))
    if size > 1:
        # A process that ends within the group aborts now and then: gloo's threads still run.
        dist.destroy_process_group()


def test_workers_repeat_the_step_together(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base")
    multiprocessing.spawn(_train, (1, None, tmp_path), nprocs=1)
    multiprocessing.spawn(_train, (2, 1, tmp_path), nprocs=2)
    alone, *others = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert alone["told"] == []
    for other in others:
        assert len(other["told"]) == 1 and other["told"][0][0] == 512
        assert other["told"] == others[0]["told"], "all workers have the same budget"
        for one, wanted in zip(other["steps"], alone["steps"], strict=True):
            assert one == pytest.approx(wanted, rel=1e-4)
