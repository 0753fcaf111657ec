"""Models from their dense weights, which are read a tensor at a time while they are quantized.

Reading maps no file: what a process holds is the quantized result and one dense tensor, by every
measure (resident, anonymous, address space).
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from orchestrator.errors import ModelError, first_line
from orchestrator.model.gguf_rope import scale_rope
from orchestrator.model.gguf_weights import gguf_weights
from orchestrator.model.source import ModelSource


def load_dense(
    source: ModelSource, device: torch.device, dtype: torch.dtype, settings: Any = None
) -> Any:
    """A causal language model from its dense weights, quantized tensor by tensor.

    Args:
        source: the model.
        device: where the result lies; each tensor is quantized there.
        dtype: of what stays dense, and of a weight before it is quantized.
        settings: what transformers quantizes with; None keeps the dense weights.

    Raises:
        ModelError: the weights cannot be read, or the model has some that they lack.
    """
    try:
        return _load(source, device, dtype, settings)
    except (ValueError, OSError, KeyError, ImportError, NotImplementedError) as error:
        kind = "" if source.gguf_file is None else " as GGUF"
        raise ModelError(
            f"model.base: {source.name} cannot be read{kind}: {first_line(error)}"
        ) from error


def _load(source: ModelSource, device: torch.device, dtype: torch.dtype, settings: Any) -> Any:
    skeleton = _skeleton(source, dtype)
    options = {} if settings is None else {"quantization_config": settings}
    with ExitStack() as files:
        if source.gguf_file is None:
            # Without quantizing, the mapped file is the model itself.
            backend = "mmap" if settings is None else "pread"
            weights = _safetensors(source.folder, backend, files)
        else:
            weights = gguf_weights(source.folder / source.gguf_file, skeleton)
        model, report = type(skeleton).from_pretrained(
            None,
            config=skeleton.config,
            state_dict=weights,
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
            **options,
        )
    lacking = sorted(report["missing_keys"])
    if lacking:
        shown = ", ".join(lacking[:3])
        raise ModelError(f"model.base: {source.name} lacks {len(lacking)} weights: {shown}")
    _read_generation_config(model, source)
    return model


def _skeleton(source: ModelSource, dtype: torch.dtype) -> Any:
    """The model without weights: its class and its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = source.trust_remote_code
    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust, **options)
    if source.gguf_file is not None:
        scale_rope(source.folder / source.gguf_file, config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)


def _safetensors(folder: Path, backend: str, files: ExitStack) -> dict[str, Any]:
    """Every tensor's name and a slice that reads it; the files stay open with `files`."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    names = [SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())
        names = sorted(set(index["weight_map"].values()))
    slices = {}
    for name in names:
        file = files.enter_context(safe_open(folder / name, framework="pt", backend=backend))
        slices.update({key: file.get_slice(key) for key in file.keys()})  # noqa: SIM118
    return slices


def _read_generation_config(model: Any, source: ModelSource) -> None:
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    if source.gguf_file is None and (source.folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
