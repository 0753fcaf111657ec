"""The proof that a saved adapter is what was trained: PEFT loads it and gives the same answers.

The products of each adapted layer may differ by rounding only, and so may the adapter's part in
them, which is small beside the base's. So may the logits, but a learning rate that is nearly too
high leaves a model that magnifies rounding from layer to layer: where all products agree, logits
that do not are told, not refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from orchestrator.data import Example
from orchestrator.errors import ProofError
from orchestrator.model.adapters import Adapter, AdapterSet, seed_of
from orchestrator.model.base import Base, from_pretrained
from orchestrator.model.lora import LoraLinear
from orchestrator.model.products import product_dtype
from orchestrator.places import write_whole
from orchestrator.training import memory
from orchestrator.training.export import PREFIX, WEIGHTS

_LOGIT_TOKENS = 256
_PRODUCT_TOKENS = 4
# Root mean square of the difference over that of the values: rounding in each dtype, with room.
_LOGITS_ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_PRODUCTS_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# How many times as far an unstable model may carry it: 0.7 in bfloat16, where logits without
# anything in common differ by 1.4.
_MAGNIFIED = 14


@dataclass(frozen=True)
class Claim:
    """What the trained model says, on the CPU.

    Attributes:
        ids: int64 (tokens,), the start of one example.
        logits: float32 (tokens, vocabulary), its logits.
        products: float32 (2, 4, outputs) of each adapted layer, of inputs drawn by its name: the
            layer's output, and the adapter's part in it.
    """

    ids: Tensor
    logits: Tensor
    products: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Keep it beside the adapter in `folder`, for a proof in another process."""
        tensors = {f"products.{name}": product for name, product in self.products.items()}
        content = save({"ids": self.ids, "logits": self.logits, **tensors})
        write_whole(_path(folder), content)

    @staticmethod
    def load(folder: Path) -> "Claim":
        """What `save` kept."""
        kept = load_file(_path(folder))
        ids, logits = kept.pop("ids"), kept.pop("logits")
        products = {name.removeprefix("products."): tensor for name, tensor in kept.items()}
        return Claim(ids, logits, products)


def has_claim(folder: Path) -> bool:
    """Whether an adapter was saved and its claim kept."""
    return _path(folder).exists()


def drop_claim(folder: Path) -> None:
    """Before an adapter is saved anew: its old claim is not the new one's."""
    _path(folder).unlink(missing_ok=True)


def _path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-claim.safetensors")


@torch.no_grad()
def claim(base: Base, adapters: AdapterSet, adapter: Adapter, example: Example) -> Claim:
    """Ask the trained model."""
    ids = torch.from_numpy(example.ids[:_LOGIT_TOKENS].astype("int64"))
    with adapters.active([(adapter, 0, -1)]), base.unpacked():
        logits = _logits(base.model, ids, base.device)
        products = {
            name: _trained_products(name, base.model.get_submodule(name), adapter)
            for name in adapter.layer_names
        }
    return Claim(ids, logits, products)


@torch.no_grad()
def prove_adapter(
    folder: Path,
    entry: Path,
    device: torch.device,
    dtype: torch.dtype,
    claimed: Claim,
    say: Callable[[str], None],
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """Reload the saved adapter through PEFT over a fresh base and compare its answers.

    The trained base must be dropped before: a GPU may hold one only.

    Args:
        folder: the adapter.
        entry: the base in its store.
        device: where to load it.
        dtype: in which it computes.
        claimed: what the trained model said.
        say: hears a warning where the model magnifies rounding.
        trust_remote_code: whether the base may bring code of its own.

    Returns:
        The relative error of the logits, the largest one of a layer's product, and the share of
        tokens for which both rank the same token first.

    Raises:
        ProofError: the weights are all zero or not finite, or an answer differs beyond rounding.
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
    product_error = _check_products(folder, model, claimed.products, dtype, device)
    logits = _logits(model, claimed.ids, device)
    error = _relative_error(logits, claimed.logits)
    allowed = _LOGITS_ALLOWED[dtype]
    if not error <= allowed:
        unstable = (
            f"The adapter in {folder}, loaded again, gives logits that differ by {error:.2g} of "
            f"their size from the trained model's, though each layer agrees to {product_error:.1g}"
            ". So a model does that magnifies rounding: choose a lower training.learning_rate "
            "under another name; this run's checkpoints hold its weights"
        )
        if not error <= _MAGNIFIED * allowed:
            raise ProofError(unstable)
        say(unstable)
    agreement = (logits.argmax(-1) == claimed.logits.argmax(-1)).float().mean().item()
    return {
        "relative_error": error,
        "largest_product_error": product_error,
        "same_first_token": agreement,
    }


def _check_weights(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    changed = [t for name, t in weights.items() if "lora_B" in name]
    if not all(torch.isfinite(t).all() for t in weights.values()):
        raise ProofError(f"The adapter in {folder} holds weights that are not finite")
    if not any(t.any() for t in changed):
        raise ProofError(
            f"The adapter in {folder} is empty: every lora_B is zero, nothing was learned"
        )


def _check_products(
    folder: Path,
    model: nn.Module,
    claimed: dict[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """The largest relative error of a layer's product."""
    from peft.tuners.lora import LoraLayer

    layers = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    if layers.keys() != claimed.keys():
        differ = ", ".join(sorted(layers.keys() ^ claimed.keys())[:5])
        raise ProofError(
            f"The adapter in {folder} changes other layers than were trained: {differ}"
        )
    largest, allowed = 0.0, _PRODUCTS_ALLOWED[dtype]
    for name, layer in layers.items():
        found = _saved_products(name, layer, dtype, device)
        for of, own, expected in zip(("", "the adapter in "), found, claimed[name], strict=True):
            error = _relative_error(own, expected)
            if not error <= allowed:
                raise ProofError(
                    f"The adapter in {folder} does not reproduce the trained model: the products "
                    f"of {of}{name} differ by {error:.3g} of their size (allowed {allowed}). The "
                    "last checkpoint holds the weights; run the same command again, and report "
                    "this if it stays"
                )
            largest = max(largest, error)
    return largest


def _logits(model: nn.Module, ids: Tensor, device: torch.device) -> Tensor:
    return model(input_ids=ids[None].to(device), use_cache=False).logits[0].float().cpu()


def _trained_products(name: str, layer: LoraLinear, adapter: Adapter) -> Tensor:
    """A wrapped layer's output, and the adapter's part in it."""
    inputs, slot = _inputs(name, layer.in_features).to(layer.device), adapter.slot(name)
    added = inputs.to(slot.a.dtype) @ slot.a.t() @ slot.b * slot.scaling
    return _stacked(layer(inputs.to(layer.compute_dtype)), added)


def _saved_products(name: str, layer: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same of a layer as PEFT has loaded it."""
    inputs = _inputs(name, layer.in_features).to(device)
    (a,), (b,), (scaling,) = (part.values() for part in (layer.lora_A, layer.lora_B, layer.scaling))
    # Rounded as in training: of few ranks a product may nearly cancel, and its rounding does not.
    a, b = (part.weight.t().to(product_dtype(dtype, device)) for part in (a, b))
    added = inputs.to(a.dtype) @ a @ b * scaling
    dense = layer.get_base_layer().weight.dtype
    return _stacked(layer(inputs.to(dense if dense.is_floating_point else dtype)), added)


def _inputs(name: str, width: int) -> Tensor:
    """Float32 (1, 4, width), which the layer's name decides."""
    drawn = torch.Generator().manual_seed(seed_of(name))
    return torch.randn(1, _PRODUCT_TOKENS, width, generator=drawn)


def _stacked(*products: Tensor) -> Tensor:
    return torch.cat([product.float().cpu() for product in products])


def _relative_error(found: Tensor, expected: Tensor) -> float:
    if torch.equal(found, expected):
        # Both may be zero: a layer that nothing was learned in.
        return 0.0
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()
