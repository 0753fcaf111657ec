"""Shapes of well-known models, so that they can be planned without a network.

Each entry holds the fields of the model's published config.json on the Hugging Face hub that
decide its shape, and `parameters`, the number of weights that the hub states for its
safetensors. A test builds each shape and compares the two.
"""

from typing import Any


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 131072 if vocab == 128256 else 4096,
        **more,
    }


def _as(model_type: str, shape: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**shape, "model_type": model_type, **more}


def _qwen2(*shape: int, tied: bool = False) -> dict[str, Any]:
    more = {"tie_word_embeddings": tied, "max_position_embeddings": 32768}
    return _as("qwen2", _llama(*shape), **more)


def _qwen3(*shape: int, tied: bool = False, **more: Any) -> dict[str, Any]:
    more = {"head_dim": 128, "max_position_embeddings": 40960, **more}
    return _as("qwen3", _llama(*shape), tie_word_embeddings=tied, **more)


def _mistral(*shape: int, **more: Any) -> dict[str, Any]:
    more = {"sliding_window": None, "max_position_embeddings": 32768, **more}
    return _as("mistral", _llama(*shape), **more)


def _gemma2(*shape: int, head: int, scalar: int) -> dict[str, Any]:
    more = {"head_dim": head, "query_pre_attn_scalar": scalar, "sliding_window": 4096}
    more = {**more, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    softcaps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    activation = {"hidden_activation": "gelu_pytorch_tanh"}
    return _as("gemma2", _llama(*shape), **more, **softcaps, **activation)


# (hub ids, parameters, config)
_TABLE: tuple[tuple[tuple[str, ...], int, dict[str, Any]], ...] = (
    # LLaMA (arXiv 2302.13971, table 2), in the hub layout of huggyllama.
    (("huggyllama/llama-7b",), 6_738_415_616, _llama(4096, 11008, 32, 32, 32, 32000)),
    (("huggyllama/llama-13b",), 13_015_864_320, _llama(5120, 13824, 40, 40, 40, 32000)),
    (("huggyllama/llama-30b",), 32_528_943_616, _llama(6656, 17920, 60, 52, 52, 32000)),
    (("huggyllama/llama-65b",), 65_285_660_672, _llama(8192, 22016, 80, 64, 64, 32000)),
    # Llama 2 (arXiv 2307.09288).
    (
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
        6_738_415_616,
        _llama(4096, 11008, 32, 32, 32, 32000),
    ),
    (
        ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf"),
        13_015_864_320,
        _llama(5120, 13824, 40, 40, 40, 32000),
    ),
    (
        ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf"),
        68_976_648_192,
        _llama(8192, 28672, 80, 64, 8, 32000),
    ),
    # Llama 3 (arXiv 2407.21783, table 3).
    (
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"),
        1_235_814_400,
        _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    ),
    (
        ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"),
        3_212_749_824,
        _llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True),
    ),
    (
        (
            "meta-llama/Meta-Llama-3-8B",
            "meta-llama/Meta-Llama-3-8B-Instruct",
            "meta-llama/Llama-3.1-8B",
            "meta-llama/Llama-3.1-8B-Instruct",
            "meta-llama/Meta-Llama-3.1-8B",
            "meta-llama/Meta-Llama-3.1-8B-Instruct",
        ),
        8_030_261_248,
        _llama(4096, 14336, 32, 32, 8, 128256),
    ),
    (
        (
            "meta-llama/Meta-Llama-3-70B",
            "meta-llama/Meta-Llama-3-70B-Instruct",
            "meta-llama/Llama-3.1-70B",
            "meta-llama/Llama-3.1-70B-Instruct",
            "meta-llama/Llama-3.3-70B-Instruct",
        ),
        70_553_706_496,
        _llama(8192, 28672, 80, 64, 8, 128256),
    ),
    (
        ("meta-llama/Llama-3.1-405B", "meta-llama/Llama-3.1-405B-Instruct"),
        405_853_388_800,
        _llama(16384, 53248, 126, 128, 8, 128256),
    ),
    # SmolLM2 (arXiv 2502.02737).
    (
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        134_515_008,
        _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    ),
    (
        ("HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M-Instruct"),
        361_821_120,
        _llama(960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True),
    ),
    (
        ("HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
        1_711_376_384,
        _llama(2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True),
    ),
    # Qwen2.5 (arXiv 2412.15115, table 1).
    (
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"),
        494_032_768,
        _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    ),
    (
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct"),
        1_543_714_304,
        _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    ),
    (
        ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-3B-Instruct"),
        3_085_938_688,
        _qwen2(2048, 11008, 36, 16, 2, 151936, tied=True),
    ),
    (
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"),
        7_615_616_512,
        _qwen2(3584, 18944, 28, 28, 4, 152064),
    ),
    (
        ("Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-14B-Instruct"),
        14_770_033_664,
        _qwen2(5120, 13824, 48, 40, 8, 152064),
    ),
    (
        ("Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-32B-Instruct"),
        32_763_876_352,
        _qwen2(5120, 27648, 64, 40, 8, 152064),
    ),
    (
        ("Qwen/Qwen2.5-72B", "Qwen/Qwen2.5-72B-Instruct"),
        72_706_203_648,
        _qwen2(8192, 29568, 80, 64, 8, 152064),
    ),
    # Qwen3 (arXiv 2505.09388, tables 1 and 2).
    (("Qwen/Qwen3-0.6B",), 596_049_920, _qwen3(1024, 3072, 28, 16, 8, 151936, tied=True)),
    (("Qwen/Qwen3-4B",), 4_022_468_096, _qwen3(2560, 9728, 36, 32, 8, 151936, tied=True)),
    (("Qwen/Qwen3-8B",), 8_190_735_360, _qwen3(4096, 12288, 36, 32, 8, 151936)),
    (("Qwen/Qwen3-14B",), 14_768_307_200, _qwen3(5120, 17408, 40, 40, 8, 151936)),
    (("Qwen/Qwen3-32B",), 32_762_123_264, _qwen3(5120, 25600, 64, 64, 8, 151936)),
    (
        ("Qwen/Qwen3-30B-A3B",),
        30_532_122_624,
        _as(
            "qwen3_moe",
            _qwen3(2048, 6144, 48, 32, 4, 151936),
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
        ),
    ),
    # Mistral (arXiv 2310.06825, table 1) and Mixtral (arXiv 2401.04088, table 1).
    (
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"),
        7_241_732_096,
        _mistral(4096, 14336, 32, 32, 8, 32000, sliding_window=4096),
    ),
    (
        ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
        7_248_023_552,
        _mistral(4096, 14336, 32, 32, 8, 32768),
    ),
    (
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        46_702_792_704,
        _as(
            "mixtral",
            _mistral(4096, 14336, 32, 32, 8, 32000),
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
    ),
    # Gemma (arXiv 2403.08295, table 1) and Gemma 2 (arXiv 2408.00118, table 1).
    (
        ("google/gemma-7b", "google/gemma-7b-it"),
        8_537_680_896,
        _as("gemma", _llama(3072, 24576, 28, 16, 16, 256000), head_dim=256,
            max_position_embeddings=8192, tie_word_embeddings=True),
    ),
    (
        ("google/gemma-2-2b", "google/gemma-2-2b-it"),
        2_614_341_888,
        _gemma2(2304, 9216, 26, 8, 4, 256000, head=256, scalar=256),
    ),
    (
        ("google/gemma-2-9b", "google/gemma-2-9b-it"),
        9_241_705_984,
        _gemma2(3584, 14336, 42, 16, 8, 256000, head=256, scalar=256),
    ),
    (
        ("google/gemma-2-27b", "google/gemma-2-27b-it"),
        27_227_128_320,
        _gemma2(4608, 36864, 46, 32, 16, 256000, head=128, scalar=144),
    ),
)  # fmt: skip

KNOWN: dict[str, dict[str, Any]] = {
    name.lower(): config for names, _, config in _TABLE for name in names
}
PARAMETERS: dict[str, int] = {name: count for names, count, _ in _TABLE for name in names}
