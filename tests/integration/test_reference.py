"""The real model: our engine against a hand-written loop of transformers, PEFT and bitsandbytes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    QuantizationConfig,
    TrainingConfig,
)
from orchestrator.data import Example, prepare
from orchestrator.model import base as bases
from orchestrator.model import source, store
from orchestrator.model.adapters import AdapterSet
from orchestrator.model.base import from_pretrained
from orchestrator.training.export import save_adapter
from tests import tiny
from tests.conftest import write_chats

STEPS, BATCH = 10, 4


@pytest.fixture(scope="module")
def entry(smollm2: Path, cache: Path) -> Path:
    """The GGUF file, quantized into the store in float32, where differences are not rounding."""
    origin = source.locate(ModelConfig(base=str(smollm2)), cache)
    return store.ensure(
        origin, QuantizationConfig(), torch.float32, cache / "bases", lambda _: None
    )


def _batches(entry: Path, tmp_path: Path) -> list[list[Example]]:
    rows = write_chats(tmp_path / "rows.jsonl", STEPS * BATCH)
    config = DataConfig(train=str(rows), validation=None)
    data = prepare(config, bases.load_tokenizer(entry), tmp_path / "cache").train
    return [[data[s * BATCH + place] for place in range(BATCH)] for s in range(STEPS)]


def _padded_loop(entry: Path, adapter: Path, batches: list[list[Example]]) -> list[float]:
    """Padded on the right with a mask, as every trainer does it; nothing of ours but the rows."""
    from peft import PeftModel

    model: Any = from_pretrained(entry, torch.device("cpu"), torch.float32)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    losses = []
    for batch in batches:
        width = max(len(example.ids) for example in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, example in enumerate(batch):
            length = len(example.ids)
            ids[row, :length] = torch.from_numpy(example.ids.astype(np.int64))
            mask[row, :length] = 1
            chosen = torch.from_numpy(example.trained.copy())
            labels[row, :length][chosen] = ids[row, :length][chosen]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_ten_steps_equal_a_padded_loop(entry: Path, tmp_path: Path) -> None:
    batches = _batches(entry, tmp_path)
    base = bases.load(entry, torch.device("cpu"))
    adapters = AdapterSet(base.model)
    lora, training = LoraConfig(rank=8), TrainingConfig(learning_rate=1e-3)
    save_adapter(adapters.add(lora, training.seed), base, "smollm2", tmp_path / "start")
    history, _ = tiny.train(base, [(lora, training)], [batches], 256, adapters)
    own = [result.loss for result in history[0]]
    assert own[-1] < own[0] - 0.3
    np.testing.assert_allclose(own, _padded_loop(entry, tmp_path / "start", batches), rtol=2e-4)
