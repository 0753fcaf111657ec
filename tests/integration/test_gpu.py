"""CUDA: the same step with other kernels. `make test-gpu` where there is a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.config import LoraConfig, QuantizationConfig, TrainingConfig
from orchestrator.model.adapters import AdapterSet
from orchestrator.model.attention import segmented_attention
from orchestrator.model.base import Base, from_pretrained, wrap
from orchestrator.model.store import bnb_config
from orchestrator.training.tenant import Tenant
from tests import tiny

pytestmark = pytest.mark.gpu

LENGTHS = [[37, 5, 64, 12], [20, 41, 9, 33], [50, 8, 8, 60]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("llama"))


def _base(folder: Path, dtype: torch.dtype) -> Base:
    settings = bnb_config(QuantizationConfig(), dtype)
    return wrap(from_pretrained(folder, torch.device("cuda"), dtype, settings), "test")


def _losses(base: Base, training: TrainingConfig) -> list[float]:
    batches = [tiny.examples(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    history, _ = tiny.train(base, [(LoraConfig(rank=4), training)], [batches], 128)
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
    tenants = [Tenant(adapters.add(LoraConfig(rank=4), 0), training, 10) for _ in range(2)]
    generator = torch.Generator("cuda").manual_seed(0)
    size = tenants[0].adapter.master.numel()
    gradients = [torch.randn(size, device="cuda", generator=generator) for _ in range(4)]
    first, second = tenants
    for step, gradient in enumerate(gradients, 1):
        if step == 3:
            second.adapter.load_state(first.adapter.state())
            second.restore(first.optimizer_tensors(), first.numbers())
        for tenant in tenants if step >= 3 else [first]:
            tenant.adapter.gradient.copy_(gradient)
            tenant.update(step)
    torch.testing.assert_close(first.adapter.master, second.adapter.master)
