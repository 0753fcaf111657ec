"""Architectures train in packed rows like the model itself, or are refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

from orchestrator.config import LoraConfig, TrainingConfig
from orchestrator.errors import ModelError
from orchestrator.model.adapters import AdapterSet, linear_layers
from orchestrator.model.base import from_pretrained
from orchestrator.model.packed import hidden_states
from orchestrator.model.support import check_architecture
from orchestrator.plan.shapes import measure
from orchestrator.training.export import save_adapter
from tests import tiny

SMALL = {"head_dim": 16}
NARROW = {"sliding_window": 8}
CONFIGS: dict[str, Any] = {
    "Llama": tiny.COMMON,
    "Qwen2": tiny.COMMON,
    "Qwen3": {**tiny.COMMON, **SMALL},
    "Mistral": {**tiny.COMMON, **NARROW},
    "Gemma": {**tiny.COMMON, **SMALL},
    "Gemma2": {**tiny.COMMON, **SMALL, **NARROW},
    "Gemma3Text": {**tiny.COMMON, **SMALL, **NARROW},
    "Phi": tiny.COMMON,
    "Phi3": tiny.COMMON,
    # Examples of up to 16 tokens turn positions by other factors than longer ones.
    "Phi3-longrope": {
        **tiny.COMMON, "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
            "short_factor": [1.0 + n / 8 for n in range(8)],
            "long_factor": [4.0 + n for n in range(8)],
        },
    },
    # Its norms have no weight.
    "NanoChat": tiny.COMMON,
    "Granite": {**tiny.COMMON, "logits_scaling": 4.0},
    "Cohere": tiny.COMMON,
    "GPTNeoX": {k: v for k, v in tiny.COMMON.items() if k != "num_key_value_heads"},
    "GPT2": {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256,
             "bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip


def make_config(name: str) -> Any:
    return getattr(transformers, f"{name.partition('-')[0]}Config")(**CONFIGS[name])


def _reference(folder: Path, adapter: Path, batches: list[list[Any]]) -> list[float]:
    """A plain loop: transformers, PEFT and bitsandbytes, one example at a time, unpacked."""
    model = from_pretrained(folder, torch.device("cpu"), torch.float32, tiny.SETTINGS)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    losses = []
    for batch in batches:
        count = sum(int(example.trained[1:].sum()) for example in batch)
        total = 0.0
        for example in batch:
            ids = torch.from_numpy(example.ids.astype(np.int64))[None]
            labels = ids.masked_fill(~torch.from_numpy(example.trained)[None], -100)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
            (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(weights, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
    return losses


# In the second a row is filled up with more tokens than it has.
@pytest.mark.parametrize("budget", [48, 1024])
@pytest.mark.parametrize("name", CONFIGS)
def test_trains_like_a_plain_loop(tmp_path: Path, name: str, budget: int) -> None:
    folder = tiny.save_model(tmp_path / "model", make_config(name))
    base = tiny.load_base(folder)
    batches = [tiny.examples(lengths, seed) for seed, lengths in enumerate([[20, 9, 33], [14, 40]])]
    batches = batches * 2
    adapters = AdapterSet(base.model)
    lora, training = LoraConfig(rank=4, alpha=8), TrainingConfig(learning_rate=1e-2)
    start = adapters.add(lora, training.seed)
    save_adapter(start, base, "tiny", tmp_path / "start")
    history, tenants = tiny.train(base, [(lora, training)], [batches], budget, adapters)
    own = [result.loss for result in history[0]]
    np.testing.assert_allclose(own, _reference(folder, tmp_path / "start", batches), rtol=2e-4)
    assert own[-1] != own[1]
    save_adapter(tenants[0].adapter, base, "tiny", tmp_path / "adapter")


def test_unknown_attention_is_refused_by_name() -> None:
    config = transformers.BloomConfig(vocab_size=128, hidden_size=64, n_layer=1, n_head=4)
    with pytest.raises(ModelError, match="BloomForCausalLM"):
        check_architecture(transformers.AutoModelForCausalLM.from_config(config))


def test_recurrent_models_are_refused_by_name() -> None:
    config = transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="MambaForCausalLM"):
        check_architecture(model)


def test_unknown_target_modules_are_refused_by_name(tmp_path: Path) -> None:
    base = tiny.load_base(tiny.save_model(tmp_path / "model"))
    with pytest.raises(ModelError, match=r"'qproj'.*q_proj"):
        AdapterSet(base.model).add(LoraConfig(target_modules=("qproj",)), 0)


def test_a_router_of_experts_is_no_layer_to_adapt() -> None:
    """It is a linear layer by class, but returns more than a product."""
    config = transformers.PhimoeConfig(**tiny.COMMON, num_local_experts=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    routers = {n for n, m in model.named_modules() if type(m).__name__ == "PhimoeTopKRouter"}
    assert routers and not routers & linear_layers(model).keys()
    assert "model.layers.0.self_attn.q_proj" in linear_layers(model)
    planned = {layer.name for layer in measure(model.to("meta")).linears}
    assert planned == linear_layers(model).keys()


def test_all_linear_means_the_same_as_in_peft(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", make_config("GPTNeoX"))
    base = tiny.load_base(folder)
    own = AdapterSet(base.model).add(LoraConfig(rank=2), 0).layer_names
    model = from_pretrained(folder, torch.device("cpu"), torch.float32, tiny.SETTINGS)
    peft = get_peft_model(model, PeftConfig(r=2, target_modules="all-linear"))
    theirs = {
        name.removeprefix("base_model.model.").partition(".lora_A")[0]
        for name, _ in peft.named_parameters()
        if "lora_A" in name
    }
    assert set(own) == theirs


def test_dropout_that_a_module_draws_by_itself_is_off(tmp_path: Path) -> None:
    rates = {"residual_dropout": 0.5, "embedding_dropout": 0.5, "attention_dropout": 0.5}
    config = transformers.Starcoder2Config(**tiny.COMMON, **rates)
    base = tiny.load_base(tiny.save_model(tmp_path / "model", config))
    base.model.train()
    tokens = torch.arange(20)
    first, second = (hidden_states(base, tokens, (12, 8)) for _ in range(2))
    torch.testing.assert_close(first, second)
