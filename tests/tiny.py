"""Tiny random models and examples for tests, quantized by the real bitsandbytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.config import LoraConfig, QuantizationConfig, TrainingConfig
from orchestrator.data import Example
from orchestrator.model.adapters import AdapterSet
from orchestrator.model.base import Base, from_pretrained, wrap
from orchestrator.model.store import bnb_config
from orchestrator.training.collective import World
from orchestrator.training.engine import Engine, StepResult
from orchestrator.training.rows import Segment
from orchestrator.training.tenant import Tenant

VOCABULARY = 128
SETTINGS = bnb_config(QuantizationConfig(), torch.float32)
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_model(folder: Path, config: Any = None, seed: int = 0) -> Path:
    """Save a random model of a configuration (a small Llama by default) as safetensors."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**COMMON))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def load_base(folder: Path, dtype: torch.dtype = torch.float32, quantization: str = "nf4") -> Base:
    """Load a saved model as a frozen base, quantized on the way."""
    settings = None
    if quantization != "none":
        settings = bnb_config(QuantizationConfig(type=quantization), dtype)
    return wrap(from_pretrained(folder, torch.device("cpu"), dtype, settings), "test")


def examples(lengths: Sequence[int], seed: int = 0) -> list[Example]:
    """Random examples; the second half of each is trained."""
    generator = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = generator.integers(3, VOCABULARY, length).astype(np.int32)
        trained = np.arange(length) >= length // 2
        made.append(Example(ids, trained, length // 2))
    return made


def train(
    base: Base,
    jobs: Sequence[tuple[LoraConfig, TrainingConfig]],
    batches: Sequence[Sequence[Sequence[Example]]],
    budget: int = 4096,
    adapters: AdapterSet | None = None,
) -> tuple[list[list[StepResult]], list[Tenant]]:
    """Train tenants side by side: batches[tenant][step] are examples."""
    adapters = adapters or AdapterSet(base.model)
    steps = len(batches[0])
    tenants = [Tenant(adapters.add(lora, t.seed), t, steps) for lora, t in jobs]
    engine = Engine(base, adapters, World(), budget)
    history: list[list[StepResult]] = [[] for _ in tenants]
    for step in range(steps):
        segments = [
            [Segment(place, step * 100 + i, e) for i, e in enumerate(batches[place][step])]
            for place in range(len(tenants))
        ]
        for place, result in enumerate(engine.step(tenants, segments, [step + 1] * len(tenants))):
            history[place].append(result)
    for tenant in tenants:
        adapters.remove(tenant.adapter)
    return history, tenants
