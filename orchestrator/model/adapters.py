"""Tenants' LoRA adapters over one frozen base.

An `AdapterSet` wraps the base's target layers once. Any number of adapters then join and leave;
each owns one flat float32 master vector (what the optimizer sees), one flat float32 gradient and
one working copy in the products' dtype, of which the layers' A and B matrices are views.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config import LoraConfig
from orchestrator.errors import ModelError
from orchestrator.model.compiled import compile_early
from orchestrator.model.fuse import fuse
from orchestrator.model.lora import LoraLinear, Placement, Slot, ThreadPlacement

# Linear layers with a forward pass of their own that is the same product.
_PRODUCTS = ("Linear4bit", "Conv1D", "FalconLinear")


@dataclass(frozen=True)
class _Shape:
    """Where one layer's matrices lie in an adapter's flat vectors."""

    offset: int
    rank: int
    inputs: int
    outputs: int

    @property
    def size(self) -> int:
        return self.rank * (self.inputs + self.outputs)

    def views(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """A (rank, inputs) and B transposed (rank, outputs), as views of a flat vector."""
        middle = self.offset + self.rank * self.inputs
        a = flat[self.offset : middle].view(self.rank, self.inputs)
        b = flat[middle : self.offset + self.size].view(self.rank, self.outputs)
        return a, b


class Adapter:
    """One tenant's LoRA weights. Made by `AdapterSet.add`.

    Attributes:
        master: float32 (parameters,), the exact weights; the optimizer's one parameter.
        gradient: float32 (parameters,), summed over the passes of a step.
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, section 3).
    """

    def __init__(self, config: LoraConfig, seed: int, layers: dict[str, LoraLinear]) -> None:
        self.config, self.seed = config, seed
        root = math.sqrt(config.rank) if config.rslora else config.rank
        self.scaling = config.alpha / root
        self._shapes: dict[str, _Shape] = {}
        offset = 0
        for name, layer in layers.items():
            shape = _Shape(offset, config.rank, layer.in_features, layer.out_features)
            self._shapes[name] = shape
            offset += shape.size
        example = next(iter(layers.values()))
        device, dtype = example.device, example.product_dtype
        self.master = nn.Parameter(torch.zeros(offset, dtype=torch.float32, device=device))
        self.gradient = torch.zeros_like(self.master, requires_grad=False)
        # Where the products are float32 the master itself is what the layers use.
        same = dtype == torch.float32
        self.working = self.master.detach() if same else torch.zeros_like(self.master, dtype=dtype)
        self._initialize()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the base's layers that this adapter changes."""
        return tuple(self._shapes)

    def slot(self, name: str) -> Slot:
        """What the layer `name` needs to run and train this adapter."""
        a, b = self._shapes[name].views(self.working)
        grad_a, grad_b = self._shapes[name].views(self.gradient)
        seed = self.seed ^ seed_of(name)
        return Slot(a, b, grad_a, grad_b, self.scaling, self.config.dropout, seed)

    def publish(self) -> None:
        """Carry the master weights over into the working copy after an optimizer step."""
        if self.working.dtype != torch.float32:
            self.working.copy_(self.master.detach())

    def state(self) -> dict[str, Tensor]:
        """Copies of the weights as PEFT has them: `layer.lora_A` (r, in), `lora_B` (out, r)."""
        tensors = {}
        for name, shape in self._shapes.items():
            a, b = shape.views(self.master.detach())
            tensors[f"{name}.lora_A.weight"] = a.cpu().clone()
            tensors[f"{name}.lora_B.weight"] = b.t().cpu().contiguous()
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over weights that `state` gave.

        Raises:
            KeyError: a layer's weights are missing.
            RuntimeError: a shape differs.
        """
        for name, shape in self._shapes.items():
            a, b = shape.views(self.master.detach())
            a.copy_(tensors[f"{name}.lora_A.weight"])
            b.copy_(tensors[f"{name}.lora_B.weight"].t())
        self.publish()

    def _initialize(self) -> None:
        """A uniform in +-1/sqrt(inputs) as in PEFT, B zero; a layer's draw hangs on its name."""
        for name, shape in self._shapes.items():
            generator = torch.Generator().manual_seed(seed_of(f"{self.seed}/{name}"))
            bound = 1 / math.sqrt(shape.inputs)
            a = torch.empty(shape.rank, shape.inputs).uniform_(-bound, bound, generator=generator)
            shape.views(self.master.detach())[0].copy_(a)
        self.publish()


class AdapterSet:
    """The adapters that share one base."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: dict[str, LoraLinear] = {}
        self._candidates = linear_layers(model)
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.placement = ThreadPlacement() if on_cpu else Placement()
        fuse(model, self._wrap)
        compile_early(model)

    def add(self, config: LoraConfig, seed: int) -> Adapter:
        """Join an adapter; its layers are wrapped where no earlier adapter has done so.

        Raises:
            ModelError: a target module does not exist in the base or cannot take an adapter.
        """
        names = target_layers(self._candidates, config.target_modules)
        layers = {name: self._wrap(name) for name in names}
        adapter = Adapter(config, seed, layers)
        for name, layer in layers.items():
            layer.slots[id(adapter)] = adapter.slot(name)
        return adapter

    def remove(self, adapter: Adapter) -> None:
        """Leave: the adapter's weights and gradients are free once the caller drops it."""
        for name in adapter.layer_names:
            del self._layers[name].slots[id(adapter)]

    @contextmanager
    def active(
        self,
        spans: Sequence[tuple[Adapter, int, int]],
        dropout_keys: tuple[tuple[int, int, int], ...] = (),
    ) -> Iterator[None]:
        """Apply each adapter to its own span [start, stop) of the row's tokens.

        One span over every token, `(adapter, 0, -1)`, applies an adapter to all there is. Without
        the segments' `dropout_keys` nothing is dropped.
        """
        placement = self.placement
        before = placement.spans, placement.dropout_keys
        placement.spans = tuple((id(adapter), start, stop) for adapter, start, stop in spans)
        placement.dropout_keys = dropout_keys
        try:
            yield
        finally:
            placement.spans, placement.dropout_keys = before

    def _wrap(self, name: str) -> LoraLinear:
        if name not in self._layers:
            layer = LoraLinear(self._candidates[name], self.placement)
            parent, _, leaf = name.rpartition(".")
            setattr(self._model.get_submodule(parent), leaf, layer)
            self._layers[name] = layer
        return self._layers[name]


def seed_of(text: str) -> int:
    """A seed that hangs on a text alone, the same in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Every linear layer that can take an adapter, by name: all but the output head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if module is not head and _is_product(module)
    }


def _is_product(module: nn.Module) -> bool:
    """Whether it does what a linear layer does; routers of experts are some that do more."""
    from transformers.pytorch_utils import Conv1D

    kind = type(module)
    plain = kind.forward is nn.Linear.forward or kind.__name__ in _PRODUCTS
    return plain and isinstance(module, (nn.Linear, Conv1D))


def target_layers(candidates: dict[str, nn.Module], targets: str | Sequence[str]) -> list[str]:
    """The layers that `lora.target_modules` names: whole names or their last parts.

    Raises:
        ModelError: a name matches no layer.
    """
    if targets == "all-linear":
        return list(candidates)
    chosen = set()
    for target in targets:
        matches = [n for n in candidates if n == target or n.endswith(f".{target}")]
        if not matches:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in candidates}))
            raise ModelError(
                f"lora.target_modules: the model has no layer {target!r}; it has {known}"
            )
        chosen.update(matches)
    return [name for name in candidates if name in chosen]
