"""A .gguf file's weights: each dequantized when it is read, or all at once where they must."""

from pathlib import Path
from typing import Any

import torch

from orchestrator.errors import ModelError
from orchestrator.model.base import load_tokenizer
from orchestrator.model.gguf_rope import scale_rope
from orchestrator.model.source import ModelSource

# Architectures whose tensors transformers' loader changes one by one, so that each can be read
# alone. Of the others it merges experts, or stores tensors under other names.
_ONE_BY_ONE = frozenset(
    {"llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2", "nemotron"}
)


class _Slice:
    """A tensor not read yet; as with a slice of a safetensors file, `[...]` reads it."""

    def __init__(self, tensor: Any, processor: Any) -> None:
        self._tensor, self._processor = tensor, processor

    def __getitem__(self, index: Any) -> torch.Tensor:
        from gguf import dequantize

        dense = dequantize(self._tensor.data, self._tensor.tensor_type)
        made = self._processor.process(weights=dense, name=self._tensor.name)
        # A copy: a tensor that was not quantized is a view of the mapped file.
        return torch.from_numpy(made.weights.copy())[index]


def read_one_by_one(file: Path) -> bool:
    """Whether `gguf_weights` can read this file.

    Raises:
        ValueError: it is no .gguf file.
    """
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(file))
    return metadata["general.architecture"] in _ONE_BY_ONE


def gguf_weights(file: Path, model: Any) -> dict[str, Any]:
    """The tensors of a .gguf file under the model's own names: float32, each read on `[...]`.

    Args:
        file: the .gguf file.
        model: the model that they belong to, on the meta device.
    """
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as loader

    reader = GGUFReader(str(file))
    architecture = loader.read_field(reader, "general.architecture")[0]
    kind = loader.TENSOR_PROCESSORS.get(architecture, loader.TensorProcessor)
    processor = kind(config=model.config.to_dict())
    names = loader.get_gguf_hf_weights_map(model, processor)
    return {
        names[tensor.name]: _Slice(tensor, processor)
        for tensor in reader.tensors
        if tensor.name in names
    }


def dequantize_gguf(source: ModelSource, dtype: torch.dtype, folder: Path) -> None:
    """Write a .gguf model and its tokenizer as a dense folder in the Hugging Face layout.

    The dense model is in memory while this runs.

    Raises:
        ModelError: the file cannot be read.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.folder,
            gguf_file=source.gguf_file,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
        )
        tokenizer = load_tokenizer(source.folder, source.gguf_file)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"model.base: {source.name} cannot be read as GGUF: {error}") from error
    scale_rope(source.folder / str(source.gguf_file), model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
