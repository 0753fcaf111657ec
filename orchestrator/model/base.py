"""A frozen base model, loaded and ready for packed rows."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orchestrator.errors import ModelError, first_line
from orchestrator.model import attention
from orchestrator.model.loss import Head

# Names under which modules of transformers keep a dropout rate of their own.
_DROPOUTS = (
    "dropout",
    "activation_dropout",
    "attention_dropout",
    "embedding_dropout",
    "hidden_dropout",
    "residual_dropout",
    "layerdrop",
)
# What a store entry says of itself: its files' sizes, its dtype, the name of its model.
ENTRY = "entry.json"


@dataclass(frozen=True)
class Base:
    """A frozen base, loaded: the model, its decoder without the head, and the head.

    attention: the implementation the model itself came with.
    short: tokens up to which a row's positions are turned by other factors than in longer rows
    (LongRoPE, Ding et al. 2024, section 3.2); None where all rows are alike.
    """

    model: Any
    decoder: nn.Module
    head: Head
    key: str
    device: torch.device
    dtype: torch.dtype
    attention: str
    short: int | None = None

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """The model's own attention, masks and cache: for generation, and to compare with."""
        training = self.model.training
        self.model.set_attn_implementation(self.attention)
        self.model.eval()
        try:
            yield
        finally:
            self.model.set_attn_implementation(attention.SEGMENTED)
            self.model.train(training)


def load_tokenizer(
    folder: Path, gguf_file: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a store entry, a model folder or a .gguf file in it."""
    from transformers import AutoTokenizer

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)


def load(entry: Path, device: torch.device, trust_remote_code: bool = False) -> Base:
    """Load a base from its store entry, frozen, in segmented attention.

    Raises:
        ModelError: the architecture cannot be passed in packed rows.
    """
    dtype = _entry_dtype(entry)
    model = from_pretrained(entry, device, dtype, trust_remote_code=trust_remote_code)
    return wrap(model, entry.name)


def wrap(model: Any, key: str) -> Base:
    """Make a loaded model a frozen base whose decoder takes packed rows.

    Raises:
        ModelError: the model has no decoder or no output head.
    """
    from bitsandbytes.nn import Linear4bit

    attention.register()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # Otherwise the first forward pass without gradients repacks the weight in place for
            # inference, and no gradient flows through it any more.
            module.support_avx512bf16_for_cpu = False
        # A step is a function of its number: only the adapters' keyed dropout draws.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            # As those of OPT and Starcoder 2 do.
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    head = model.get_output_embeddings()
    decoder = model.base_model
    if head is None or decoder is model:
        raise ModelError(f"{type(model).__name__} is no causal language model with an output head")
    own_attention = model.config._attn_implementation
    model.set_attn_implementation(attention.SEGMENTED)
    if model.config._attn_implementation != attention.SEGMENTED:
        raise ModelError(f"{type(model).__name__} does not take another attention function")
    text_config = model.config.get_text_config()
    softcap = getattr(text_config, "final_logit_softcapping", None)
    return Base(
        model,
        decoder,
        Head(head.weight, head.bias, softcap, _logit_scale(text_config)),
        key,
        head.weight.device,
        head.weight.dtype,
        own_attention,
        _short(text_config),
    )


def _short(config: Any) -> int | None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    known = rope.get("original_max_position_embeddings")
    return known or getattr(config, "original_max_position_embeddings", None)


def _logit_scale(config: Any) -> float:
    """Cohere multiplies its logits by a constant, Granite divides them by one."""
    if getattr(config, "logits_scaling", None):
        return 1 / config.logits_scaling
    return getattr(config, "logit_scale", None) or 1.0


def _entry_dtype(entry: Path) -> torch.dtype:
    name = json.loads((entry / ENTRY).read_text())["dtype"]
    return getattr(torch, name)


def from_pretrained(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    settings: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal language model from safetensors only.

    Raises:
        ModelError: the folder cannot be read as one.
    """
    from transformers import AutoModelForCausalLM

    options = {} if settings is None else {"quantization_config": settings}
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        first = first_line(error)
        raise ModelError(f"model.base: {folder} cannot be loaded: {first}") from error
