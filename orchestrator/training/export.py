"""The adapter as a plain PEFT folder."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from orchestrator.model.adapters import Adapter, linear_layers
from orchestrator.model.base import Base

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(adapter: Adapter, base: Base, base_name: str, folder: Path) -> None:
    """Write the adapter so that `PeftModel.from_pretrained(base, folder)` loads it."""
    from peft import LoraConfig

    config = adapter.config
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=_target_names(base.model, adapter.layer_names),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    settings.save_pretrained(beside)
    weights = {f"{PREFIX}{name}": tensor for name, tensor in adapter.state().items()}
    save_file(weights, beside / WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)


def _target_names(model: Any, layers: Sequence[str]) -> list[str]:
    """Short names where they mean exactly these layers, else the whole names."""
    wrapped = {name.removesuffix(".base") for name in linear_layers(model)}
    short = {name.rpartition(".")[2] for name in layers}
    meant = {name for name in wrapped if name.rpartition(".")[2] in short}
    return sorted(short if meant == set(layers) else layers)
