"""The adapter as a plain PEFT folder, and the proof that it is what was trained."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.data import Example
from orchestrator.errors import ProofError
from orchestrator.model.adapters import Adapter, AdapterSet, linear_layers
from orchestrator.model.base import Base, from_pretrained
from orchestrator.training import memory

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PROOF_TOKENS = 256
# Root mean square of the difference over that of the logits: rounding in each dtype, with room.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


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
    weights = {f"{_PREFIX}{name}": tensor for name, tensor in adapter.state().items()}
    save_file(weights, beside / _WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    beside.replace(folder)


def _target_names(model: Any, layers: Sequence[str]) -> list[str]:
    """Short names where they mean exactly these layers, else the whole names."""
    wrapped = {name.removesuffix(".base") for name in linear_layers(model)}
    short = {name.rpartition(".")[2] for name in layers}
    meant = {name for name in wrapped if name.rpartition(".")[2] in short}
    return sorted(short if meant == set(layers) else layers)


@torch.no_grad()
def proof_logits(
    base: Base, adapters: AdapterSet, adapter: Adapter, example: Example
) -> tuple[Tensor, Tensor]:
    """Token ids and the trained model's logits on the start of one example, on the CPU."""
    ids = torch.from_numpy(example.ids[:_PROOF_TOKENS].astype("int64"))
    with adapters.active([(adapter, 0, -1)]), base.unpacked():
        logits = base.model(input_ids=ids[None].to(base.device), use_cache=False).logits[0]
    return ids, logits.float().cpu()


def keep_claim(folder: Path, ids: Tensor, logits: Tensor) -> None:
    """Keep beside an adapter what `proof_logits` gave, for a proof in another process."""
    save_file({"ids": ids, "logits": logits}, _claim_path(folder))


def has_claim(folder: Path) -> bool:
    """Whether an adapter was saved and its claim kept."""
    return _claim_path(folder).exists()


def kept_claim(folder: Path) -> tuple[Tensor, Tensor]:
    """What `keep_claim` kept."""
    kept = load_file(_claim_path(folder))
    return kept["ids"], kept["logits"]


def _claim_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-claim.safetensors")


@torch.no_grad()
def prove_adapter(
    folder: Path,
    entry: Path,
    device: torch.device,
    dtype: torch.dtype,
    ids: Tensor,
    logits: Tensor,
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """Reload the saved adapter through PEFT over a fresh base and compare logits.

    The trained base must be dropped before: a GPU may hold one only.

    Returns:
        The relative error and the share of tokens for which both rank the same token first.

    Raises:
        ProofError: the weights are all zero or not finite, or the logits differ beyond rounding.
    """
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel

    _check_weights(folder)
    # Quantized weights and their modules know each other, so they go with a collection only.
    memory.release_cached(device)
    model = from_pretrained(entry, device, dtype, trust_remote_code=trust_remote_code)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, folder).eval()
    again = model(input_ids=ids[None].to(device), use_cache=False).logits[0].float().cpu()
    error = ((again - logits).square().mean() / logits.square().mean()).sqrt().item()
    agreement = (again.argmax(-1) == logits.argmax(-1)).float().mean().item()
    allowed = _TOLERANCE[dtype]
    if not error <= allowed:
        raise ProofError(
            f"The adapter in {folder} does not reproduce the trained model: its logits differ by "
            f"{error:.3g} of their size (allowed {allowed}). The last checkpoint holds the "
            "weights; run the same command again, and report this if it stays"
        )
    return {"relative_error": error, "same_first_token": agreement}


def _check_weights(folder: Path) -> None:
    weights = load_file(folder / _WEIGHTS)
    changed = [t for name, t in weights.items() if "lora_B" in name]
    if not all(torch.isfinite(t).all() for t in weights.values()):
        raise ProofError(f"The adapter in {folder} holds weights that are not finite")
    if not any(t.any() for t in changed):
        raise ProofError(
            f"The adapter in {folder} is empty: every lora_B is zero, nothing was learned"
        )
