"""The engine's promises on a tiny model in float32: nothing about the cut shows in the result."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from orchestrator.config import LoraConfig, TrainingConfig
from orchestrator.data import Example
from orchestrator.model.adapters import AdapterSet
from orchestrator.model.base import Base
from orchestrator.model.loss import Head, token_losses
from orchestrator.training import budget as budgets
from orchestrator.training import optimizers
from orchestrator.training.collective import World
from orchestrator.training.engine import Engine
from orchestrator.training.rows import Segment, build
from orchestrator.training.tenant import Tenant
from tests import tiny

LENGTHS = [[37, 5, 64, 12], [20, 41, 9, 33], [50, 8, 8, 60], [3, 17, 29, 44]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def base(folder: Path) -> Base:
    return tiny.load_base(folder)


def _batches(seed: int = 0) -> list[list[Example]]:
    return [tiny.examples(lengths, seed + step) for step, lengths in enumerate(LENGTHS)]


def _losses(history: list) -> list[list[float]]:
    return [[result.loss for result in tenant] for tenant in history]


TRAINING = TrainingConfig(learning_rate=5e-3)
# Adam scales a gradient that is nearly zero, and its rounding, up to a whole step of 5e-3.
ADAM_NOISE = 2e-4


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_token_budget_changes_nothing(base: Base, dropout: float) -> None:
    lora = LoraConfig(rank=4, dropout=dropout)
    adapters = AdapterSet(base.model)
    runs = [
        tiny.train(base, [(lora, TRAINING)], [_batches()], tokens, adapters)
        for tokens in (16, 64, 4096)
    ]
    for history, tenants in runs[1:]:
        np.testing.assert_allclose(_losses(history), _losses(runs[0][0]), rtol=1e-5)
        torch.testing.assert_close(
            tenants[0].adapter.master, runs[0][1][0].adapter.master, rtol=2e-3, atol=ADAM_NOISE
        )


def test_dropout_drops(base: Base) -> None:
    adapters = AdapterSet(base.model)
    with_it, _ = tiny.train(
        base, [(LoraConfig(rank=4, dropout=0.5), TRAINING)], [_batches()], 4096, adapters
    )
    without, _ = tiny.train(base, [(LoraConfig(rank=4), TRAINING)], [_batches()], 4096, adapters)
    # The first loss is that of the base: B is still zero.
    assert _losses(with_it)[0][0] == pytest.approx(_losses(without)[0][0], rel=1e-6)
    assert abs(_losses(with_it)[0][-1] - _losses(without)[0][-1]) > 1e-4


def test_fused_tenants_equal_solo_runs(base: Base) -> None:
    jobs = [
        (LoraConfig(rank=4, alpha=8), TrainingConfig(learning_rate=5e-3, seed=1)),
        (
            LoraConfig(rank=16, alpha=16, dropout=0.2, rslora=True),
            TrainingConfig(learning_rate=1e-3, seed=2, scheduler="cosine", weight_decay=0.1),
        ),
        (
            LoraConfig(rank=8, target_modules=("q_proj", "down_proj")),
            TrainingConfig(learning_rate=2e-2, seed=3, max_grad_norm=None, warmup_steps=2),
        ),
    ]
    batches = [_batches(seed * 10) for seed in range(len(jobs))]
    adapters = AdapterSet(base.model)
    fused, together = tiny.train(base, jobs, batches, 90, adapters)
    for place, (job, own) in enumerate(zip(jobs, batches, strict=True)):
        solo, alone = tiny.train(base, [job], [own], 4096, adapters)
        np.testing.assert_allclose(_losses(fused)[place], _losses(solo)[0], rtol=2e-5)
        torch.testing.assert_close(
            together[place].adapter.master, alone[0].adapter.master, rtol=2e-3, atol=ADAM_NOISE
        )


def test_fused_tenants_have_optimizers_of_their_own(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without CUDA bitsandbytes' optimizers are the same, but for the paging.
    monkeypatch.setattr(optimizers, "resolve", lambda name, *_: name)
    names = ("adamw", "paged_adamw", "paged_adamw_8bit")
    jobs = [
        (LoraConfig(rank=8), TrainingConfig(learning_rate=5e-3, optimizer=name)) for name in names
    ]
    batches = [_batches()] * len(jobs)
    adapters = AdapterSet(base.model)
    fused, together = tiny.train(base, jobs, batches, 90, adapters)
    kinds = [type(tenant.optimizer).__name__ for tenant in together]
    assert kinds == ["AdamW", "PagedAdamW32bit", "PagedAdamW8bit"]
    for place, job in enumerate(jobs):
        solo, alone = tiny.train(base, [job], batches[:1], 4096, adapters)
        np.testing.assert_allclose(_losses(fused)[place], _losses(solo)[0], rtol=2e-5)
        torch.testing.assert_close(
            together[place].adapter.master, alone[0].adapter.master, rtol=2e-3, atol=ADAM_NOISE
        )
    # One that keeps its past in 8 bit goes another way than the others.
    whole, paged, coarse = (tenant.adapter.master for tenant in together)
    torch.testing.assert_close(paged, whole, rtol=2e-3, atol=ADAM_NOISE)
    assert (coarse - whole).abs().max() > 5 * ADAM_NOISE


def test_gradient_checkpointing_changes_nothing(base: Base) -> None:
    lora = LoraConfig(rank=4, dropout=0.2)
    adapters = AdapterSet(base.model)
    plain, _ = tiny.train(base, [(lora, TRAINING)], [_batches()], 64, adapters)
    budgets.apply(budgets.Budget(64, True), base.model)
    again, _ = tiny.train(base, [(lora, TRAINING)], [_batches()], 64, adapters)
    assert base.model.is_activation_checkpointing
    np.testing.assert_allclose(_losses(again), _losses(plain), rtol=1e-6)


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_a_quantized_base_trains_as_a_dense_one_of_the_same_weights(
    folder: Path, quantization: str
) -> None:
    quantized, dense = (tiny.load_base(folder, quantization=q) for q in (quantization, "none"))
    count = 0
    for name, layer in quantized.model.named_modules():
        if isinstance(layer, Linear4bit):
            assert layer.weight.quant_state.quant_type == quantization
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            dense.model.get_submodule(name).weight.data.copy_(weight)
            count += 1
    assert count == 14
    jobs, batches = [(LoraConfig(rank=4), TRAINING)], [[_batches()[0]] * 6]
    losses, expected = (
        _losses(tiny.train(model, jobs, batches)[0])[0] for model in (quantized, dense)
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses == sorted(losses, reverse=True)


def test_float16_with_its_scaled_loss_learns_as_float32_does(folder: Path) -> None:
    """Not offered on a CPU, where it is slow; the code is that of a GPU without bfloat16."""
    jobs, batches = [(LoraConfig(rank=4), TRAINING)], [_batches()]
    losses = []
    for dtype in (torch.float16, torch.float32):
        history, tenants = tiny.train(tiny.load_base(folder, dtype, "none"), jobs, batches)
        assert all(result.update and result.update.applied for result in history[0])
        assert tenants[0].scaler.is_enabled() == (dtype == torch.float16)
        losses.append(_losses(history)[0])
    np.testing.assert_allclose(*losses, rtol=1e-2)


def test_evaluating_first_leaves_gradients_for_every_adapter(folder: Path) -> None:
    # bitsandbytes repacks 4-bit weights in the first pass without gradients on some CPUs.
    base = tiny.load_base(folder, torch.bfloat16)
    adapters = AdapterSet(base.model)
    adapter = adapters.add(LoraConfig(rank=4), 0)
    engine = Engine(base, adapters, World(), 4096)
    segments = [Segment(0, i, e) for i, e in enumerate(tiny.examples([20, 30]))]
    base.model.eval()
    before = engine.evaluate(adapter, segments)[0]
    with adapters.active([(adapter, 0, -1)]), base.unpacked(), torch.no_grad():
        base.model(input_ids=torch.arange(8)[None])
    tenant = Tenant(adapter, TrainingConfig(learning_rate=1e-2), 10)
    for step in (1, 2):
        engine.step([tenant], [segments], [step])
    for name in adapter.layer_names:
        slot = adapter.slot(name)
        assert slot.b.abs().sum() > 0, f"{name} has learned nothing"
    assert engine.evaluate(adapter, segments)[0] < before


def test_tokens_that_are_not_trained_have_no_loss(base: Base) -> None:
    """Gradients of prompt tokens are zero: changing the targets there changes nothing."""
    example = tiny.examples([24])[0]
    row = build([Segment(0, 0, example)])
    trained = np.flatnonzero(example.trained)
    assert row.positions.tolist() == (trained - 1).tolist()
    assert row.targets.tolist() == example.ids[trained].tolist()
    hidden = torch.randn(24, 64, requires_grad=True)
    weights = torch.full((len(row.targets),), 1.0)
    total, _ = token_losses(hidden.index_select(0, row.positions), base.head, row.targets, weights)
    total.backward()
    rows_with_gradient = set(hidden.grad.abs().sum(1).nonzero().flatten().tolist())
    assert rows_with_gradient == set((trained - 1).tolist())


def test_infinite_loss_stops_that_tenant_only(base: Base) -> None:
    adapters = AdapterSet(base.model)
    bad = Tenant(adapters.add(LoraConfig(rank=4), 0), TRAINING, 5)
    good = Tenant(adapters.add(LoraConfig(rank=4), 1), TRAINING, 5)
    with torch.no_grad():
        bad.adapter.master.fill_(float("nan"))
    bad.adapter.publish()
    engine = Engine(base, adapters, World(), 4096)
    own = tiny.examples([20, 30])
    batches = [[Segment(place, i, e) for i, e in enumerate(own)] for place in (0, 1)]
    failed, went_on = engine.step([bad, good], batches, [1, 1])
    assert failed.update is None and math.isnan(failed.loss)
    assert went_on.update is not None and math.isfinite(went_on.loss)
    solo = Tenant(adapters.add(LoraConfig(rank=4), 1), TRAINING, 5)
    (alone,) = engine.step([solo], [[Segment(0, i, e) for i, e in enumerate(own)]], [1])
    assert went_on.loss == pytest.approx(alone.loss, rel=1e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_chunked_loss_equals_torch(
    softcap: float | None, bias: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three chunks, each of blocks whose last is short.
    monkeypatch.setattr("orchestrator.lengths.SCORES_BYTES", 4 * 300 * 9)
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight, added = torch.randn(300, 16), torch.randn(300) if bias else None
    head = Head(weight, added, softcap, scale, logits_bytes=4 * 300 * 20)
    assert (head.chunk(), head.block()) == (20, 9)
    targets = torch.randint(0, 300, (50,))
    weights = torch.rand(50)
    total, losses = token_losses(hidden, head, targets, weights)
    (own,) = torch.autograd.grad(total, hidden)
    logits = hidden @ head.weight.t()
    logits = (logits + head.bias if bias else logits) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (reference,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_loss_of_a_16_bit_head_rounds_its_logits_only(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(200, 64).bfloat16().requires_grad_()
    weight = (torch.randn(500, 64) / 8).bfloat16()
    head = Head(weight, softcap=softcap, logits_bytes=4 * 500 * 64)
    targets, weights = torch.randint(0, 500, (200,)), torch.rand(200)
    total, losses = token_losses(hidden, head, targets, weights)
    (own,) = torch.autograd.grad(total, hidden)
    wide = hidden.detach().double().requires_grad_()
    logits = wide @ weight.double().t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (reference,) = torch.autograd.grad((expected * weights).sum(), wide)
    assert (losses - expected).abs().max() < 0.03 and (losses - expected).mean().abs() < 1e-3
    assert (own - reference).norm() < 0.01 * reference.norm()
