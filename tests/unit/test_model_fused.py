"""Our forward passes of known modules: the numbers and gradients of the modules' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from orchestrator import processor
from orchestrator.config import LoraConfig, TrainingConfig
from orchestrator.model import fuse, gated
from orchestrator.model.adapters import Adapter, AdapterSet
from orchestrator.model.base import Base, wrap
from orchestrator.model.packed import hidden_states
from tests import tiny

LENGTHS = (7, 1, 12)


def llama(kind: str = "Llama") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**tiny.COMMON)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 2)
    return model


def fused(base: Base) -> set[str]:
    """Types of the modules that have a forward pass of ours."""
    return {type(m).__name__ for m in base.model.modules() if "forward" in vars(m)}


def trained_adapter(adapters: AdapterSet) -> Adapter:
    adapter = adapters.add(LoraConfig(rank=4), 0)
    with torch.no_grad():
        adapter.master.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    adapter.publish()
    return adapter


def outcome(base: Base, adapters: AdapterSet, adapter: Adapter) -> tuple[torch.Tensor, ...]:
    """Hidden states of a packed row, and the adapter's gradient of a sum over them."""
    tokens = torch.arange(sum(LENGTHS)) % tiny.VOCABULARY
    adapter.gradient.zero_()
    with adapters.active([(adapter, 0, -1)]):
        hidden = hidden_states(base, tokens, LENGTHS)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        (hidden.float() * weights).sum().backward()
    return hidden.detach(), adapter.gradient.clone()


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Granite"])
def test_known_kinds_give_their_own_numbers_and_gradients(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = wrap(llama(kind), "ours")
    adapters = AdapterSet(ours.model)
    assert fused(ours) == {f"{kind}{part}" for part in ("RMSNorm", "MLP", "Attention")}
    got = outcome(ours, adapters, trained_adapter(adapters))
    monkeypatch.setattr(fuse, "_KINDS", ())
    own = wrap(llama(kind), "own")
    plain = AdapterSet(own.model)
    assert not fused(own)
    expected = outcome(own, plain, trained_adapter(plain))
    for mine, theirs in zip(got, expected, strict=True):
        # A single gradient may be what is left of large ones: hence by the largest.
        atol = 1e-5 * theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=atol)
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_without_gradients_gives_the_numbers_of_one_with_them(dtype: torch.dtype) -> None:
    base = wrap(llama().to(dtype), "ours")
    adapters = AdapterSet(base.model)
    adapter = trained_adapter(adapters)
    tokens = torch.arange(sum(LENGTHS)) % tiny.VOCABULARY
    with adapters.active([(adapter, 0, -1)]):
        trained = hidden_states(base, tokens, LENGTHS)
        with torch.no_grad():
            measured = hidden_states(base, tokens, LENGTHS)
    assert trained.requires_grad and not measured.requires_grad
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert (measured - trained).norm() < close * trained.norm()


def test_another_activation_keeps_its_own_forward_pass() -> None:
    model = llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    base = wrap(model, "gelu")
    AdapterSet(base.model)
    assert fused(base) == {"LlamaRMSNorm", "LlamaAttention"}


def test_a_module_that_differs_keeps_its_own_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a known kind and is none: here the two inner products are swapped."""
    right: Callable[..., torch.Tensor] = gated.gated

    def swapped(module: Any, x: torch.Tensor) -> torch.Tensor:
        modules = module._modules
        modules["gate_proj"], modules["up_proj"] = modules["up_proj"], modules["gate_proj"]
        try:
            return right(module, x)
        finally:
            modules["gate_proj"], modules["up_proj"] = modules["up_proj"], modules["gate_proj"]

    monkeypatch.setattr(gated, "gated", swapped)
    base = wrap(llama(), "differs")
    AdapterSet(base.model)
    assert fused(base) == {"LlamaRMSNorm", "LlamaAttention"}


@pytest.mark.parametrize("slow", [True, False])
def test_a_bfloat16_base_learns_alike_in_products_of_both_dtypes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    monkeypatch.setattr(processor, "slow_bfloat16", lambda: slow)
    folder = tiny.save_model(tmp_path / "model")
    batches = [tiny.examples([20, 9, 33], seed) for seed in range(3)]
    lora, training = LoraConfig(rank=4), TrainingConfig(learning_rate=1e-3)
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        base = tiny.load_base(folder, dtype)
        adapters = AdapterSet(base.model)
        history, tenants = tiny.train(base, [(lora, training)], [batches], 48, adapters)
        losses.append([result.loss for result in history[0]])
        wide = torch.float32 if slow or dtype == torch.float32 else torch.bfloat16
        assert tenants[0].adapter.working.dtype == wide
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
