"""Bases load small: quantized within a shard of the result, and one copy for all of a machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from orchestrator.config import ModelConfig, QuantizationConfig
from orchestrator.errors import ModelError
from orchestrator.model import base, source, store
from tests import tiny

pytestmark = pytest.mark.memory

WORKERS = 4
SHARD = 24 * 2**20
# What bitsandbytes needs for one tensor, the check of the architecture, Python's own objects.
ROOM = 48 * 2**20

PRELUDE = """
import json, resource, sys
from pathlib import Path
import psutil, torch
from orchestrator.config import ModelConfig, QuantizationConfig
from orchestrator.model import base, source, store
from orchestrator.training import memory

def ensure(model, cache):
    origin = source.locate(ModelConfig(base=model), Path(cache))
    return store.ensure(
        origin, QuantizationConfig(), torch.bfloat16, Path(cache) / "bases", lambda _: None
    )
"""

QUANTIZE = """
warm, model, cache, allowed = sys.argv[1:]
memory.return_freed_memory()
ensure(warm, cache)
limit = psutil.Process().memory_info().vms + int(allowed)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(ensure(model, cache))
"""

WORK = """
from tests import tiny
from orchestrator.config import LoraConfig, TrainingConfig
entry = Path(sys.argv[1])
loaded = base.load(entry, torch.device("cpu"))
tiny.train(loaded, [(LoraConfig(rank=4), TrainingConfig())], [[tiny.examples([6, 5])]])
with loaded.unpacked(), torch.no_grad():
    loaded.model(input_ids=torch.arange(3, 12)[None], use_cache=False)
print("ready", flush=True)
sys.stdin.read()
"""


def _start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Path:
    """A random Llama of 170 MiB in bfloat16, in eight shards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    folder = tmp_path_factory.mktemp("sharded")
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    config = LlamaConfig(**{**tiny.COMMON, **shape, "num_attention_heads": 16})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARD)
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def entry(sharded: Path, chat_model: Path, cache: Path) -> Path:
    """The quantized base, made where the address space has no room for the dense one."""
    result = 0.3 * _bytes(sharded)
    allowed = int(result) + SHARD + ROOM
    assert allowed < 0.8 * _bytes(sharded) and len(list(sharded.glob("*.safetensors"))) > 6
    process = _start(QUANTIZE, chat_model, sharded, cache, allowed)
    out, _ = process.communicate(timeout=250)
    assert process.returncode == 0
    made = Path(out.splitlines()[-1])
    assert _bytes(made) < result
    return made


def test_quantizing_needs_room_for_a_shard_and_the_result(entry: Path) -> None:
    loaded = base.load(entry, torch.device("cpu"))
    weight = loaded.model.get_submodule("model.layers.7.mlp.up_proj").weight
    assert weight.quant_state.shape == (2816, 1024) and weight.quant_state.nested


@pytest.fixture
def workers(entry: Path) -> Iterator[list[subprocess.Popen[str]]]:
    with ExitStack() as started:
        processes = [started.enter_context(_start(WORK, entry)) for _ in range(WORKERS)]
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            yield processes
        finally:
            for process in processes:
                process.kill()


def _mapped(process: int, file: Path) -> dict[str, int]:
    """Bytes of a process's mappings of a file, as the kernel's smaps has them."""
    sums = dict.fromkeys(("Size", "Rss", "Pss", "Private_Dirty", "Anonymous"), 0)
    inside = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if " " in name:
            inside = line.endswith(str(file))
        elif inside and name in sums:
            sums[name] += int(rest.split()[0]) * 1024
    return sums


def test_workers_of_a_machine_hold_one_copy(
    entry: Path, workers: list[subprocess.Popen[str]]
) -> None:
    file = entry / "model.safetensors"
    held = [_mapped(worker.pid, file) for worker in workers]
    size = file.stat().st_size
    # Each has read it, none has written to it, and together they hold it once.
    assert all(each["Rss"] > 0.9 * size for each in held)
    assert all(each["Private_Dirty"] == each["Anonymous"] == 0 for each in held)
    assert sum(each["Pss"] for each in held) < 1.05 * size


def test_weights_are_views_of_the_entrys_file(entry: Path) -> None:
    loaded = base.load(entry, torch.device("cpu"))
    places = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("/model.safetensors")
    ]

    def mapped(tensor: torch.Tensor) -> bool:
        return any(first <= tensor.data_ptr() < last for first, last in places)

    for name, weight in loaded.model.named_parameters():
        assert mapped(weight.data), name
        state = getattr(weight, "quant_state", None)
        assert state is None or (mapped(state.absmax) and mapped(state.state2.absmax)), name


CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_bits_are_those_of_transformers(tmp_path: Path, name: str, quantization: str) -> None:
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from tests.conftest import make_tokenizer

    kind, more = CONFIGS[name]
    common = {"vocab_size": 320} if name == "gpt2" else {**tiny.COMMON, "vocab_size": 320}
    tiny.save_model(tmp_path / "whole", getattr(transformers, kind)(**{**common, **more}))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    make_tokenizer().save_pretrained(tmp_path / "model")
    settings = QuantizationConfig(type=quantization)
    origin = source.locate(ModelConfig(base=str(tmp_path / "model")), tmp_path)
    made = store.ensure(origin, settings, torch.float32, tmp_path / "bases", lambda _: None)
    options = None if quantization == "none" else store.bnb_config(settings, torch.float32)
    theirs = base.from_pretrained(tmp_path / "model", torch.device("cpu"), torch.float32, options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, other = (
        load_file(made / "model.safetensors"),
        load_file(tmp_path / "theirs" / "model.safetensors"),
    )
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[key], other[key]) for key in ours)
    assert (made / "config.json").read_text() == (tmp_path / "theirs/config.json").read_text()


def test_weights_that_are_not_there_are_named(tmp_path: Path, chat_model: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(chat_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    origin = source.locate(ModelConfig(base=str(folder)), tmp_path)
    with pytest.raises(ModelError, match=r"lacks 1 weights: model\.layers\.1\.mlp\.up_proj"):
        store.ensure(origin, QuantizationConfig(), torch.float32, tmp_path, lambda _: None)
