"""CUDA: the same step with other kernels. `make test-gpu` where there is a GPU."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config import LoraConfig, ModelConfig, QuantizationConfig, TrainingConfig
from orchestrator.model import source, store
from orchestrator.model.adapters import AdapterSet
from orchestrator.model.attention import segmented_attention
from orchestrator.model.base import Base, from_pretrained, wrap
from orchestrator.model.store import bnb_config
from orchestrator.training import budget, memory
from orchestrator.training.tenant import Tenant
from tests import tiny
from tests.integration.conftest import Commands, curve, journal

pytestmark = pytest.mark.gpu

LENGTHS = [[37, 5, 64, 12], [20, 41, 9, 33], [50, 8, 8, 60]]
SMALL = LoraConfig(rank=4)
# A rank that gives the tiny model 131,072 weights: bitsandbytes pages from 100,000 on.
PAGED = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("llama"))


def _base(folder: Path, dtype: torch.dtype) -> Base:
    settings = bnb_config(QuantizationConfig(), dtype)
    return wrap(from_pretrained(folder, torch.device("cuda"), dtype, settings), "test")


def _losses(base: Base, training: TrainingConfig, lora: LoraConfig = SMALL) -> list[float]:
    batches = [tiny.examples(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    history, _ = tiny.train(base, [(lora, training)], [batches], 128)
    return [result.loss for result in history[0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 8])
def test_variable_length_attention(dtype: torch.dtype, window: int | None) -> None:
    lengths = (17, 1, 46)
    shapes = [(1, 4, 64, 32), (1, 2, 64, 32), (1, 2, 64, 32)]
    inputs = [torch.randn(s, dtype=dtype, device="cuda", requires_grad=True) for s in shapes]
    copies = [t.detach().float().cpu().requires_grad_() for t in inputs]
    module = torch.nn.Identity()
    options = {"segment_lengths": lengths, "sliding_window": window}
    out, _ = segmented_attention(module, *inputs, None, **options)
    expected, _ = segmented_attention(module, *copies, None, **options)
    torch.testing.assert_close(out.float().cpu(), expected, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(expected)
    own = torch.autograd.grad(out, inputs, grad.to(out))
    reference = torch.autograd.grad(expected, copies, grad)
    for a, b in zip(own, reference, strict=True):
        torch.testing.assert_close(a.float().cpu(), b, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trains_as_on_the_cpu(folder: Path, dtype: torch.dtype) -> None:
    training = TrainingConfig(learning_rate=5e-3, optimizer="adamw")
    on_cpu = _losses(tiny.load_base(folder), training)
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    np.testing.assert_allclose(_losses(_base(folder, dtype), training), on_cpu, rtol=tolerance)


@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_optimizers_train_and_resume(folder: Path, optimizer: str) -> None:
    base = _base(folder, torch.bfloat16)
    training = TrainingConfig(learning_rate=5e-3, optimizer=optimizer)
    adapters = AdapterSet(base.model)
    tenants = [Tenant(adapters.add(LoraConfig(rank=PAGED), 0), training, 10) for _ in range(2)]
    generator = torch.Generator("cuda").manual_seed(0)
    size = tenants[0].adapter.master.numel()
    gradients = [torch.randn(size, device="cuda", generator=generator) for _ in range(4)]
    first, second = tenants
    for step, gradient in enumerate(gradients, 1):
        if step == 3:
            second.adapter.load_state(first.adapter.state())
            second.restore(first.optimizer_tensors(), first.numbers())
            assert _paged(first) == _paged(second) == [True, True]
        for tenant in tenants if step >= 3 else [first]:
            tenant.adapter.gradient.copy_(gradient)
            tenant.update(step)
    torch.testing.assert_close(first.adapter.master, second.adapter.master)
    assert _paged(first) == _paged(second) == [True, True]


def _paged(tenant: Tenant) -> list[bool]:
    state = tenant.optimizer.state[tenant.adapter.master]
    return [getattr(state[name], "is_paged", False) for name in ("state1", "state2")]


def test_paged_memory_is_counted_and_given_back() -> None:
    # What other tests have left behind would go in between.
    gc.collect()
    device, size = torch.device("cuda", 0), 1 << 26
    master = torch.nn.Parameter(torch.zeros(size, device=device))
    adapter: Any = SimpleNamespace(
        master=master,
        gradient=torch.ones_like(master, requires_grad=False),
        working=master.detach(),
        publish=lambda: None,
    )
    tenant = Tenant(adapter, TrainingConfig(optimizer="paged_adamw"), 10)
    others = memory.used_bytes(device) - torch.cuda.memory_allocated(device)
    tenant.update(1)
    paged = memory.used_bytes(device) - torch.cuda.memory_allocated(device) - others
    assert paged == 2 * 4 * size
    free = torch.cuda.mem_get_info(device)[0]
    del tenant
    assert torch.cuda.mem_get_info(device)[0] - free > 0.9 * paged
    assert memory.used_bytes(device) - torch.cuda.memory_allocated(device) == others
    # Freeing it has left no error for whoever uses the GPU next.
    assert torch.ones(2, device=device).sum().item() == 2


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw", "paged_adamw_8bit"])
def test_gradient_checkpointing_changes_nothing(folder: Path, optimizer: str) -> None:
    training = TrainingConfig(learning_rate=5e-3, optimizer=optimizer)
    lora = LoraConfig(rank=PAGED, dropout=0.2)
    histories = []
    for checkpointing in (False, True):
        base = _base(folder, torch.float32)
        budget.apply(budget.Budget(128, checkpointing), base.model)
        assert base.model.is_activation_checkpointing == checkpointing
        histories.append(_losses(base, training, lora))
    np.testing.assert_allclose(*histories, rtol=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_base_is_quantized_where_it_trains(chat_model: Path, tmp_path: Path, device: str) -> None:
    origin = source.locate(ModelConfig(base=str(chat_model)), tmp_path)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    where = torch.device(device)
    store.ensure(
        origin, QuantizationConfig(), torch.float32, tmp_path, lambda _: None, device=where
    )
    assert (torch.cuda.max_memory_allocated() > before) == (where.type == "cuda")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 3e-2)])
def test_a_fine_tune_that_was_stopped_goes_on_as_if_it_had_not_been(
    commands: Commands, job_file: Callable[..., Path], tmp_path: Path, dtype: str, tolerance: float
) -> None:
    sections = {"quantization": {"compute_dtype": dtype}, "lora": {"rank": PAGED, "dropout": 0.1}}
    whole, halved = job_file("whole", **sections), job_file("halved", **sections)
    undisturbed = commands.run("finetune", whole, "--local", "--json")
    assert undisturbed.status == 0, undisturbed.err
    half = commands.run("finetune", halved, "--local", "--json", "--set", "training.max_steps=6")
    assert half.status == 0 and half.result["steps"] == 6, half.err
    ended = commands.run("finetune", halved, "--local", "--json")
    assert ended.status == 0, ended.err
    starts = [event for event in journal(tmp_path / "runs" / "halved") if event["event"] == "start"]
    assert [start["resumed_from"] for start in starts] == [0, 6]
    assert all(start["device"].startswith("cuda") for start in starts)
    assert starts[0]["trainable_parameters"] > 1e5
    found, expected = curve(tmp_path / "runs" / "halved"), curve(tmp_path / "runs" / "whole")
    assert [step for step, *_ in found] == [step for step, *_ in expected] == list(range(1, 13))
    np.testing.assert_allclose(
        [loss for _, loss, _ in found], [loss for _, loss, _ in expected], rtol=tolerance
    )
    assert ended.result["eval_loss"] == pytest.approx(
        undisturbed.result["eval_loss"], rel=tolerance
    )
    assert ended.result["eval_loss"] < ended.result["initial_eval_loss"]


# As Ray Train starts a worker: gloo for all, every GPU of the machine in sight, its own chosen.
WORKER = """
import json, sys, time
import torch, torch.distributed as dist
from orchestrator.training.collective import join

rank, meeting = int(sys.argv[1]), sys.argv[2]
device = torch.device("cuda", rank)
torch.cuda.set_device(device)
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
world = join(rank, 2, device, "node", 120.0)
backend = dist.get_backend(world._tensors)
world.ask = lambda: (rank == 1, False)
generator = torch.Generator().manual_seed(rank)
whole = torch.randn(1000, generator=generator).to(device)
double = torch.arange(6, dtype=torch.float64, device=device).view(2, 3) * (rank + 1)
world.sum([whole, double])
answers, waited, began = world.take_answers(), world.waited, time.perf_counter()
torch.cuda._sleep(2 * 10**9)
world.sum([torch.ones(1, device=device)])
seconds, waited = time.perf_counter() - began, world.waited - waited
print(json.dumps([backend, whole.tolist(), double.tolist(), answers, waited < seconds / 2]))
dist.destroy_process_group()
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_workers_sum_over_nccl_and_count_only_what_they_wait_for_others(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outs = [json.loads(worker.communicate(timeout=200)[0].splitlines()[-1]) for worker in workers]
    parts = [torch.randn(1000, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    double = (torch.arange(6.0).view(2, 3) * 3).tolist()
    for out in outs:
        assert out == ["nccl", sum(parts).tolist(), double, [True, False], True]
