"""A .gguf file read tensor by tensor gives what transformers reads as a whole."""

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from orchestrator.config import QuantizationConfig
from orchestrator.errors import ModelError
from orchestrator.model.dense import load_dense
from orchestrator.model.gguf_weights import read_one_by_one
from orchestrator.model.source import ModelSource
from orchestrator.model.store import bnb_config

HIDDEN, INNER, VOCABULARY, LAYERS = 64, 128, 96, 2
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}


def write(
    path: Path, architecture: str, without: str = "", divisors: torch.Tensor | None = None
) -> ModelSource:
    """A random model: matrices in Q8_0, norms and the embedding in float32."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    names = [f"blk.{layer}.{name}" for layer in range(LAYERS) for name in SHAPES]
    for name in names:
        if name != without:
            dense = random.standard_normal(SHAPES[name.split(".")[2]], dtype=np.float32)
            packed = gguf.quantize(dense, gguf.GGMLQuantizationType.Q8_0)
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    norms = [f"blk.{n}.{kind}_norm" for n in range(LAYERS) for kind in ("attn", "ffn")]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", random.random(HIDDEN, dtype=np.float32))
    embedding = random.standard_normal((VOCABULARY, HIDDEN), dtype=np.float32)
    writer.add_tensor("token_embd.weight", embedding)
    if divisors is not None:
        writer.add_rope_freq_base(5e5)
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelSource(path.name, path.parent, path.name, "test", False)


def test_every_tensor_is_the_one_that_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    source = write(tmp_path / "model.gguf", "llama")
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    ours = load_dense(source, torch.device("cpu"), torch.bfloat16)
    theirs = whole.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


def test_the_weights_are_quantized_as_from_a_dense_folder(tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", "llama")
    settings = bnb_config(QuantizationConfig(), torch.bfloat16)
    device = torch.device("cpu")
    load_dense(source, device, torch.bfloat16).save_pretrained(tmp_path / "dense")
    dense = ModelSource("dense", tmp_path / "dense", None, "test", False)
    ours = load_dense(source, device, torch.bfloat16, settings).state_dict()
    theirs = load_dense(dense, device, torch.bfloat16, settings).state_dict()
    assert any(tensor.dtype == torch.uint8 for tensor in ours.values())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", "llama", without="blk.1.ffn_up")
    with pytest.raises(ModelError, match=r"lacks 1 weights: model\.layers\.1\.mlp\.up_proj"):
        load_dense(source, torch.device("cpu"), torch.bfloat16)


def test_architectures_whose_tensors_are_merged_are_read_whole(tmp_path: Path) -> None:
    for name, alone in (("llama", True), ("qwen2moe", False), ("gpt2", False)):
        write(tmp_path / f"{name}.gguf", name)
        assert read_one_by_one(tmp_path / f"{name}.gguf") is alone


def _divisors(factor: float) -> torch.Tensor:
    """Of each frequency, as llama.cpp's converter has them for Llama 3 (rope theta 500,000)."""
    found = []
    for place in range(HIDDEN // 4 // 2):
        wavelength = 2 * math.pi * 5e5 ** (place / (HIDDEN // 4 // 2))
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        short, long = wavelength < 8192 / 4, wavelength > 8192
        found.append(1.0 if short else factor if long else between)
    return torch.tensor(found)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_of_positions_is_read_from_its_divisors(
    tmp_path: Path, factor: float
) -> None:
    source = write(tmp_path / "model.gguf", "llama", divisors=_divisors(factor))
    model = load_dense(source, torch.device("cpu"), torch.bfloat16)
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert model.config.rope_parameters["factor"] == factor
    plain = 5e5 ** -(torch.arange(HIDDEN // 8) / (HIDDEN // 8))
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / _divisors(factor))


def test_another_scaling_of_positions_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "model.gguf", "llama", divisors=torch.linspace(1, 3, HIDDEN // 8))
    with pytest.raises(ModelError, match=r"rope_freqs\.weight.*not read from GGUF"):
        load_dense(source, torch.device("cpu"), torch.bfloat16)
