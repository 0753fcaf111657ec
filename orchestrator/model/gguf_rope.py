"""How a .gguf file scales rotary positions; transformers leaves it out of the config."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import ModelError

_DIVISORS = "rope_freqs.weight"
# Of Llama 3.1, 3.2 and 3.3, whose factors alone differ (8 and 32).
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def scale_rope(file: Path, config: Any) -> None:
    """Give a config the scaling of positions that belongs to the file's weights.

    Args:
        file: the .gguf file. Llama 3.1 and later keep the divisor of each frequency in a tensor.
        config: what transformers read of it; `rope_parameters` changes.

    Raises:
        ModelError: the file scales positions in a way that is not read here.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import read_field

    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return
    reader = GGUFReader(str(file))
    architecture = read_field(reader, "general.architecture")[0]
    named = read_field(reader, f"{architecture}.rope.scaling.type")
    tensors = {t.name: t.data for t in reader.tensors if t.name.startswith("rope_")}
    if not tensors and (not named or named[0] == "none"):
        return
    if set(tensors) == {_DIVISORS} and "rope_theta" in rope:
        divisors = torch.from_numpy(tensors[_DIVISORS].copy()).float()
        config.rope_parameters = {**rope, **_LLAMA3, "factor": divisors.max().item()}
        if _close(_divisors(config, len(divisors)), divisors):
            return
    what = ", ".join([*named, *tensors])
    raise ModelError(
        f"model.base: {file.name} scales rotary positions ({what}) in a way that is not read from "
        "GGUF; take the model's own folder or hub id"
    )


def _divisors(config: Any, count: int) -> Tensor:
    """What the config's scaling divides each of `count` frequencies by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(count) / count)
    return plain / scaled if len(scaled) == count else torch.zeros(count)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-2)
