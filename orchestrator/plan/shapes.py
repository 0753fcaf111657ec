"""A model's shape: the class transformers builds from its config, on the meta device.

Nothing is downloaded but a config.json, and no weight exists: building a model of 405 billion
parameters takes a second and no memory.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.config import ModelConfig
from orchestrator.errors import ModelError, UnplannableError, first_line
from orchestrator.plan.known import KNOWN
from orchestrator.plan.standins import ATTENTION, register

# By a config's content: a command plans the same model several times, for one trial and for many.
_shapes: dict[Any, "Shape"] = {}
# Linear layers with a forward pass of their own that is the same product. Others are no plain
# layers, such as routers of experts: they get no adapter and are not quantized.
_PRODUCTS = ("Conv1D", "FalconLinear")


@dataclass(frozen=True)
class Linear:
    """A linear layer. `quantized`: transformers stores it in 4 bit when asked to quantize."""

    name: str
    inputs: int
    outputs: int
    quantized: bool

    @property
    def weights(self) -> int:
        """Number of elements of the weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True, eq=False)
class Shape:
    """What a model's config says of its size.

    parameters: all weights, tied ones once. linears: its linear layers, the head left out.
    dense: elements of every other tensor that is held in the compute dtype: embeddings, head,
    norms, biases, fused experts. experts: elements of those alone; bitsandbytes quantizes linear
    layers only, and transformers keeps all experts of a layer in one tensor. vocabulary and
    hidden: of the output head.
    """

    config: Any
    parameters: int
    linears: tuple[Linear, ...]
    dense: int
    experts: int
    vocabulary: int
    hidden: int
    layers: int
    trust_remote_code: bool = False


def read_shape(config: ModelConfig) -> Shape:
    """The shape of a job's base.

    Raises:
        UnplannableError: the config is nowhere to be had, or is no causal language model's.
    """
    loaded, trust = _read_config(config), config.trust_remote_code
    content = (type(loaded), loaded.to_json_string(use_diff=False), trust)
    if content not in _shapes:
        shape = measure(build(loaded, trust_remote_code=trust))
        _shapes[content] = replace(shape, trust_remote_code=trust)
    return _shapes[content]


def build(config: Any, dtype: str = "bfloat16", trust_remote_code: bool = False) -> Any:
    """The model of a config on the meta device, frozen, in training mode.

    Raises:
        UnplannableError: the config is no causal language model's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    register()
    # The model writes into its config.
    own = deepcopy(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                own,
                dtype=getattr(torch, dtype),
                attn_implementation=ATTENTION,
                trust_remote_code=trust_remote_code,
            )
    except (ValueError, KeyError, ImportError) as error:
        raise UnplannableError(
            f"model.base: {type(config).__name__} cannot be planned: {first_line(error)}"
        ) from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.train()


def measure(model: Any) -> Shape:
    """The shape of a model on the meta device.

    Raises:
        UnplannableError: it has no output head.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    head = model.get_output_embeddings()
    if head is None:
        name = type(model).__name__
        raise UnplannableError(f"{name} is no causal language model with an output head")
    skipped = list(get_keys_to_not_convert(model))
    linears = []
    for name, module in model.named_modules():
        kind = type(module)
        plain = kind.forward is nn.Linear.forward or kind.__name__ in _PRODUCTS
        if module is head or not (plain and isinstance(module, (nn.Linear, Conv1D))):
            continue
        outputs, inputs = module.weight.shape
        if isinstance(module, Conv1D):
            inputs, outputs = outputs, inputs
        convertible = isinstance(module, Conv1D) or type(module) is nn.Linear
        quantized = convertible and should_convert_module(name, skipped)
        linears.append(Linear(name, inputs, outputs, quantized))
    total = sum(p.numel() for p in model.parameters())
    inner = sum(layer.weights for layer in linears)
    buffers = sum(b.numel() for b in model.buffers())
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    vocabulary, hidden = head.weight.shape
    return Shape(
        config=model.config,
        parameters=total,
        linears=tuple(linears),
        dense=total - inner + buffers,
        experts=experts,
        vocabulary=vocabulary,
        hidden=hidden,
        layers=model.config.get_text_config().num_hidden_layers,
    )


def _read_config(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    path = Path(config.base).expanduser()
    known = KNOWN.get(config.base.lower())
    if not path.exists() and known is not None and config.revision in (None, "main"):
        return AutoConfig.for_model(**known)
    if path.suffix == ".gguf" and path.is_file():
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    named_as_path = path.suffix == ".gguf" or config.base.startswith((".", "/", "~"))
    if named_as_path and not path.exists():
        raise ModelError(f"model.base: {config.base} does not exist")
    try:
        return AutoConfig.from_pretrained(
            path if path.is_dir() else config.base,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UnplannableError(
            f"model.base: the config.json of {config.base} could not be read "
            f"({first_line(error)}). Check the name, HF_TOKEN and the network; or give a local "
            f"folder, a .gguf file, or one of the {len(KNOWN)} hub ids whose shape "
            "ships with this package, such as meta-llama/Llama-3.1-8B"
        ) from error
