"""Predicted against measured peak memory: `python -m tests.benchmarks.memory [NAME]...`

Every job is planned in one process and trained by the real engine in another, over a random base
that was quantized beforehand. Peak is what the kernel calls VmHWM, from before the base is loaded
until some steps are done. Prints a table; exits 1 where a prediction is off by more than 10%.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.allocator import settings

ALLOWED = 0.10
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A job to predict and to measure: rows of `tokens`, of examples at most `length` long."""

    model: str
    rank: int = 16
    tokens: int = 1024
    length: int = 256
    checkpointing: bool = False
    tenants: int = 1
    dtype: str = "bfloat16"
    targets: tuple[str, ...] | None = None
    quantization: str = "nf4"


_QWEN = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 151936}
MODELS: dict[str, dict[str, Any]] = {
    # SmolLM2-135M: a large vocabulary beside small layers.
    "llama-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
    # Wide and shallow, like a slice of an 8B model.
    "llama-wide": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "qwen2-0.5b": {
        **_QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "tie_word_embeddings": True,
    },
    "mistral-window": {
        "model_type": "mistral", "hidden_size": 1024, "intermediate_size": 3584,
        "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4,
        "vocab_size": 32000, "sliding_window": 128,
    },
    "gemma2-small": {
        "model_type": "gemma2", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 64000, "sliding_window": 4096,
    },
    "gpt2-small": {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        "vocab_size": 50257,
    },
    "llama-tiny": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 768,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
    # Llama-3.2-3B and Llama-3.1-8B.
    "llama-3b": {
        "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}  # fmt: skip

CASES: dict[str, Case] = {
    "135m": Case("llama-135m"),
    "135m-checkpointing": Case("llama-135m", checkpointing=True),
    "135m-2048-rank-64": Case("llama-135m", rank=64, tokens=2048, checkpointing=True),
    "135m-8-tenants": Case("llama-135m", rank=8, tenants=8, length=128),
    "135m-flash": Case("llama-135m", length=1024),
    "wide": Case("llama-wide", length=512),
    "wide-checkpointing": Case("llama-wide", rank=64, length=512, checkpointing=True),
    "wide-float32": Case("llama-wide", rank=8, tokens=512, dtype="float32", checkpointing=True),
    "qwen2": Case("qwen2-0.5b", rank=32),
    "qwen2-4-tenants": Case("qwen2-0.5b", tenants=4, checkpointing=True),
    "qwen2-attention-only": Case("qwen2-0.5b", tokens=512, targets=("q_proj", "v_proj")),
    "mistral-window": Case("mistral-window", rank=32),
    "gemma2": Case("gemma2-small", rank=8, tokens=512),
    "gpt2": Case("gpt2-small", rank=32, tokens=2048),
    "tiny": Case("llama-tiny", rank=8),
    "tiny-2-tenants": Case("llama-tiny", rank=8, tenants=2, tokens=512, length=64),
    "3b": Case("llama-3b", tokens=512),
    "3b-16-bit": Case("llama-3b", tokens=512, checkpointing=True, quantization="none"),
    "8b": Case("llama-8b", tokens=256),
    "8b-4-tenants": Case("llama-8b", tokens=512, length=128, checkpointing=True, tenants=4),
    "8b-16-bit": Case("llama-8b", rank=8, tokens=256, checkpointing=True, quantization="none"),
}
# Bases of gigabytes: minutes each, and as much of the disk.
LARGE = {name for name in CASES if name.startswith(("3b", "8b"))}


def main() -> None:
    """Print the table of the named cases, or of all."""
    if len(sys.argv) == 4 and sys.argv[1] in _ROLES:
        print(json.dumps(_ROLES[sys.argv[1]](Case(**json.loads(sys.argv[2])), Path(sys.argv[3]))))
        return
    names = sys.argv[1:] or list(CASES)
    print(f"{'job':<24}{'predicted':>12}{'measured':>12}{'error':>9}", flush=True)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            predicted, measured = compare(CASES[name], Path(folder))
            error = predicted / measured - 1
            worst = max(worst, abs(error))
            sizes = "".join(f"{count / 2**20:>8.0f} MiB" for count in (predicted, measured))
            print(f"{name:<24}{sizes}{error:>+9.1%}", flush=True)
    sys.exit(worst > ALLOWED)


def compare(case: Case, folder: Path) -> tuple[int, int]:
    """Predicted and measured peak bytes of a case, each from a process of its own."""
    entry = folder / f"{case.model}-{case.quantization}-{case.dtype}"
    if not entry.exists():
        _in_process("build", case, entry)
    predicted = _in_process("predict", case, entry)
    return predicted, _in_process("measure", case, entry)


def _in_process(role: str, case: Case, entry: Path) -> int:
    arguments = [sys.executable, "-m", "tests.benchmarks.memory", role, json.dumps(vars(case))]
    done = subprocess.run(
        [*arguments, str(entry)],
        env={**os.environ, **settings({}), "PYTHONWARNINGS": "ignore"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{role} {case}: {done.stderr[-2000:]}")
    return int(done.stdout.splitlines()[-1])


def _job(case: Case, entry: Path) -> Any:
    from orchestrator.jobfile import job_from_mapping

    return job_from_mapping(
        {
            "name": "memory",
            "model": {"base": str(entry)},
            "quantization": {"type": case.quantization, "compute_dtype": case.dtype},
            "lora": {"rank": case.rank, "target_modules": list(case.targets or ()) or "all-linear"},
            "data": {"train": "none.jsonl", "max_length": case.length},
            "training": {
                "tokens_per_pass": case.tokens,
                "gradient_checkpointing": case.checkpointing,
                "optimizer": "adamw",
            },
        }
    )


def _predict(case: Case, entry: Path) -> int:
    from orchestrator.plan import plan_job
    from orchestrator.quiet import quiet_libraries

    quiet_libraries()
    plan = plan_job(_job(case, entry), trials=case.tenants, calibrate=False)
    print(json.dumps(plan.to_json(), indent=1), file=sys.stderr)
    return plan.per_gpu_bytes["total"]


def _build(case: Case, entry: Path) -> int:
    """A random base, in the layout of the base store."""
    import torch

    from orchestrator.config import QuantizationConfig
    from orchestrator.model.dense import load_dense
    from orchestrator.model.source import ModelSource
    from orchestrator.model.store import bnb_config

    dtype = getattr(torch, case.dtype)
    dense = case.quantization == "none"
    settings = None if dense else bnb_config(QuantizationConfig(type=case.quantization), dtype)
    # Beside the entry: the folder of temporary files may lie in memory.
    with tempfile.TemporaryDirectory(dir=entry.parent) as name:
        _write_dense(MODELS[case.model], Path(name))
        source = ModelSource(case.model, Path(name), None, case.model, False)
        load_dense(source, torch.device("cpu"), dtype, settings).save_pretrained(entry)
    record = {"files": {}, "dtype": case.dtype, "name": case.model}
    (entry / "entry.json").write_text(json.dumps(record))
    return 0


def _write_dense(shape: dict[str, Any], folder: Path) -> None:
    """Random weights in bfloat16, a file per tensor: no more than one of them is held."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

    config = AutoConfig.for_model(**shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.save_pretrained(folder)
    files = {}
    for name, weight in dict(model.named_parameters()).items():
        value = torch.empty(weight.shape, dtype=torch.bfloat16)
        # A norm of small numbers would leave nothing of the activations.
        value = value.normal_(std=0.02) if weight.dim() > 1 else value.fill_(1)
        files[name] = f"{name}.safetensors"
        save_file({name: value}, folder / files[name])
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"weight_map": files}))


def _measure(case: Case, entry: Path) -> int:
    """Train for some steps; the peak of this process's resident memory."""
    import torch

    from orchestrator.lengths import row_lengths
    from orchestrator.model import base as bases
    from orchestrator.model.adapters import AdapterSet
    from orchestrator.model.attention import DENSE_LIMIT
    from orchestrator.training import budget, memory
    from orchestrator.training.collective import World
    from orchestrator.training.engine import Engine
    from orchestrator.training.rows import Segment
    from orchestrator.training.tenant import Tenant
    from tests import tiny

    device = torch.device("cpu")
    memory.keep_freed_memory()
    memory.reset_peak(device)
    job = _job(case, entry)
    base = bases.load(entry, device)
    # The file is mapped: a row of the embedding counts from its first token on. A long run has
    # met them all, these few steps have not.
    base.model.get_input_embeddings().weight.sum()
    adapters = AdapterSet(base.model)
    tenants = [
        Tenant(adapters.add(job.lora, seed), job.training, STEPS) for seed in range(case.tenants)
    ]
    budget.apply(budget.Budget(case.tokens, case.checkpointing), base.model)
    engine = Engine(base, adapters, World(), case.tokens)
    # Nor has a row of each length been passed, of examples of all lengths, for which products are
    # compiled and after which holes stay.
    for tokens in [*row_lengths(case.tokens), *row_lengths(case.tokens)[::-1]]:
        row = [Segment(0, 0, example) for example in tiny.examples(_sizes(tokens, case.length))]
        engine.step(tenants[:1], [row], [1])
    for step in range(STEPS):
        # Long examples keep less than those whose attention's probabilities are kept.
        length = case.length if step % 2 == 0 else min(case.length, DENSE_LIMIT)
        each = case.tokens // length // case.tenants
        examples = [
            [replace(e, trained=e.ids >= 0) for e in tiny.examples([length] * each, step)]
            for _ in tenants
        ]
        batches = [
            [Segment(place, step * each + n, e) for n, e in enumerate(batch)]
            for place, batch in enumerate(examples)
        ]
        engine.step(tenants, batches, [step + 1] * len(batches))
    return memory.peak_bytes(device)


def _sizes(tokens: int, longest: int) -> list[int]:
    """Lengths of examples that fill a row, drawn evenly up to the longest."""
    import random

    drawn, sizes = random.Random(tokens), list[int]()
    while tokens - sum(sizes) > 1:
        sizes.append(min(drawn.randint(2, longest), tokens - sum(sizes)))
    return sizes


_ROLES = {"build": _build, "predict": _predict, "measure": _measure}


if __name__ == "__main__":
    main()
