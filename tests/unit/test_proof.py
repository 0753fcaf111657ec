"""A saved adapter is proved against what the trained model said, and a wrong one is found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import LoraConfig
from orchestrator.errors import ProofError
from orchestrator.model.adapters import Adapter, AdapterSet
from orchestrator.model.base import Base
from orchestrator.training import proof
from orchestrator.training.export import save_adapter
from orchestrator.training.proof import Claim
from tests import tiny
from tests.unit.test_architectures import CONFIGS, make_config

(EXAMPLE,) = tiny.examples([40])


class Trained:
    """A small model with an adapter that is saved in `folder`."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, quantization: str, config: Any = None
    ) -> None:
        self.entry, self.folder, self.dtype = folder / "model", folder / "adapter", dtype
        tiny.save_model(self.entry, config)
        self.base: Base = tiny.load_base(self.entry, dtype, quantization)
        self.adapters = AdapterSet(self.base.model)
        self.adapter: Adapter = self.adapters.add(LoraConfig(rank=4), 0)
        self.said: list[str] = []

    def change(self, size: float, layer: int = 0) -> None:
        """Draw each weight of B anew in one layer, beside what it is."""
        torch.manual_seed(layer)
        with torch.no_grad():
            slot = self.adapter.slot(self.adapter.layer_names[layer])
            slot.b.add_(torch.randn_like(slot.b), alpha=size)
            if self.dtype != torch.float32:
                self.adapter.master.copy_(self.adapter.working)

    def claim(self) -> Claim:
        return proof.claim(self.base, self.adapters, self.adapter, EXAMPLE)

    def save(self) -> None:
        save_adapter(self.adapter, self.base, "tiny", self.folder)

    def prove(self, claim: Claim) -> dict[str, float]:
        device = torch.device("cpu")
        return proof.prove_adapter(
            self.folder, self.entry, device, self.dtype, claim, self.said.append
        )


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(tmp_path, torch.float32, "none")


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str
)
def test_an_adapter_is_what_was_trained(tmp_path: Path, dtype: torch.dtype, error: float) -> None:
    trained = Trained(tmp_path, dtype, "none")
    for layer in range(3):
        trained.change(0.1, layer)
    trained.save()
    proved = trained.prove(trained.claim())
    assert proved["relative_error"] < error and proved["largest_product_error"] < error
    assert proved["same_first_token"] > 0.9 and not trained.said


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_of_every_architecture_are_proved(tmp_path: Path, name: str) -> None:
    trained = Trained(tmp_path, torch.float32, "none", make_config(name))
    for layer in range(len(trained.adapter.layer_names)):
        trained.change(0.03, layer)
    trained.save()
    proved = trained.prove(trained.claim())
    assert proved["relative_error"] < 1e-4 and proved["largest_product_error"] < 1e-5


def test_an_empty_adapter_is_none(trained: Trained) -> None:
    trained.save()
    with pytest.raises(ProofError, match="empty"):
        trained.prove(trained.claim())


def test_one_layer_that_differs_is_found_and_named(trained: Trained) -> None:
    trained.change(0.1)
    trained.save()
    trained.change(0.01, layer=5)
    name = trained.adapter.layer_names[5]
    with pytest.raises(ProofError, match=f"the products of {name} differ"):
        trained.prove(trained.claim())


def test_a_small_part_that_differs_is_found(tmp_path: Path) -> None:
    """An adapter changes a layer's products by a few hundredths, as rounding to bfloat16 might."""
    trained = Trained(tmp_path, torch.bfloat16, "none")
    for layer in range(len(trained.adapter.layer_names)):
        trained.change(0.0015, layer)
    trained.save()
    proved = trained.prove(trained.claim())
    assert proved["largest_product_error"] < 0.01
    claim = trained.claim()
    for layer in range(len(trained.adapter.layer_names)):
        # As another scale would.
        slot = trained.adapter.slot(trained.adapter.layer_names[layer])
        slot.b.mul_(1.1)
    trained.adapter.master.data.copy_(trained.adapter.working)
    trained.save()
    with pytest.raises(ProofError, match=r"the products of the adapter in .* differ by 0\.(09|1)"):
        trained.prove(claim)


def test_an_adapter_of_fewer_layers_is_found(trained: Trained) -> None:
    trained.change(0.1)
    trained.save()
    claim = trained.claim()
    with pytest.raises(ProofError, match=r"other layers than were trained: model\.extra"):
        trained.prove(
            replace(claim, products={**claim.products, "model.extra": claim.logits[None]})
        )


def test_rounding_that_a_model_magnifies_is_told(tmp_path: Path) -> None:
    """What a learning rate that is nearly too high leaves; seen with 0.18 in bfloat16."""
    trained = Trained(tmp_path, torch.bfloat16, "none")
    trained.change(0.1)
    trained.save()
    claim = trained.claim()
    noise = torch.randn_like(claim.logits) * claim.logits.square().mean().sqrt()
    proved = trained.prove(replace(claim, logits=claim.logits + 0.2 * noise))
    assert proved["relative_error"] == pytest.approx(0.2, rel=0.1)
    (said,) = trained.said
    assert "differ by 0.2" in said and "training.learning_rate" in said
    with pytest.raises(ProofError, match=r"training\.learning_rate"):
        trained.prove(replace(claim, logits=claim.logits + 2 * noise))


def test_float32_rounds_too_little_to_be_magnified_so(trained: Trained) -> None:
    trained.change(0.1)
    trained.save()
    claim = trained.claim()
    noise = torch.randn_like(claim.logits) * claim.logits.square().mean().sqrt()
    with pytest.raises(ProofError, match=r"differ by 0\.2"):
        trained.prove(replace(claim, logits=claim.logits + 0.2 * noise))


def test_a_claim_is_kept_for_another_process(trained: Trained, tmp_path: Path) -> None:
    trained.change(0.1)
    claim = trained.claim()
    assert not proof.has_claim(trained.folder)
    claim.save(trained.folder)
    assert proof.has_claim(trained.folder)
    kept = Claim.load(trained.folder)
    assert torch.equal(kept.ids, claim.ids) and torch.equal(kept.logits, claim.logits)
    assert kept.products.keys() == set(trained.adapter.layer_names)
    assert all(torch.equal(kept.products[name], claim.products[name]) for name in kept.products)
