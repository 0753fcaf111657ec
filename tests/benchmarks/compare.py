"""Our step beside TRL's on this machine; prints one JSON line.

    python -m tests.benchmarks.compare [--rows FILE] [--steps N] [--batch N] [--rank N]
                                       [--rounds N] [--trl SETTING]...

FILE is jsonl with question and answer (GSM8K's columns); without it rows of the same lengths are
made from the demo's dialogues. Every contestant is a process of its own and sees the same rows in
the same order; the first steps of each are not counted. TRL runs in all its settings, or in those
named; where the processor has no bfloat16 most of them take minutes a step. The machine is noisy:
read the ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.benchmarks.material import finish, journal, start, write_model, write_rows
from tests.benchmarks.trl_runner import SETTINGS, WARM_UP
from tests.benchmarks.turns import Run, by_turns, ratio


def main() -> None:
    """Run every contestant and print the line."""
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder / "rows.jsonl", 4 * options.steps * options.batch, options.rows)
        model = write_model(folder / "model")
        # In turns, since the machine's speed drifts; the faster one counts.
        local = [_ours(folder, model, rows, options, f"local{number}") for number in range(2)]
        ours = {
            "default": max(local, key=lambda result: result["tokens_per_second"]),
            "checkpointing": _ours(
                folder, model, rows, options, "ck", "training.gradient_checkpointing=true"
            ),
        }
        share = _ray_share(folder, model, rows, options)
        ordered = folder / "ordered.jsonl"
        _write_in_order(rows, ordered, options)
        trl = {s: _trl(model, ordered, s, options) for s in options.trl or SETTINGS}
        print(json.dumps(_report(ours, trl, share, model, options)))


def _report(
    ours: dict[str, Any],
    trl: dict[str, Any],
    ray_share: float,
    model: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    own = ours["default"]
    best = max(trl.values(), key=lambda result: result["tokens_per_second"])
    # Packed rows hold other examples in a step.
    same_rows = next((result for s, result in trl.items() if "packing" not in SETTINGS[s]), best)
    pairs = list(zip(own["losses"], same_rows["losses"], strict=False))
    rate = max(map(_matmul_rate, ("bfloat16", "float32")))
    return {
        "tokens_per_second": own["tokens_per_second"],
        "trl": {name: result["tokens_per_second"] for name, result in trl.items()},
        **{
            f"ratio_to_trl_{name}": own["tokens_per_second"] / result["tokens_per_second"]
            for name, result in {**trl, "best": best}.items()
        },
        "trl_best": best["setting"],
        "peak_bytes": {name: result["peak_bytes"] for name, result in ours.items()},
        "trl_peak_bytes": {name: result["peak_bytes"] for name, result in trl.items()},
        "checkpointing_tokens_per_second": ours["checkpointing"]["tokens_per_second"],
        "losses": own["losses"],
        "trl_losses": {name: result["losses"] for name, result in trl.items()},
        "mean_loss_difference": statistics.mean(a - b for a, b in pairs),
        "matmul_flops_per_second": rate,
        "share_of_matmul_rate": _flops_per_second(own, model, options.rank) / rate,
        "ray_share_of_a_step": ray_share,
        "steps": options.steps,
        "cores": os.cpu_count(),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10, help="turns of Ray and of --local")
    parser.add_argument("--trl", action="append", choices=list(SETTINGS), metavar="SETTING")
    return parser.parse_args()


def _job(
    folder: Path, model: Path, rows: Path, options: argparse.Namespace, name: str, steps: int
) -> dict[str, Any]:
    return {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"base": str(model)},
        "lora": {"rank": options.rank, "alpha": 2 * options.rank},
        "data": {"train": str(rows), "validation": None, "max_length": 1024},
        "training": {
            "max_steps": steps,
            "batch_size": options.batch,
            "learning_rate": 2e-4,
            "gradient_checkpointing": False,
        },
        "checkpoint": {"every": steps},
        "evaluation": {"samples": 0},
        "cluster": {"address": "local"},
    }


def _ours(
    folder: Path, model: Path, rows: Path, options: argparse.Namespace, name: str, *settings: str
) -> dict[str, Any]:
    job = _job(folder, model, rows, options, name, options.steps)
    arguments = [part for setting in settings for part in ("--set", setting)]
    result = finish(start(folder, job, *arguments, "--local"))
    events = journal(folder / "runs" / name)
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


def _ray_share(folder: Path, model: Path, rows: Path, options: argparse.Namespace) -> float:
    """What a step through Ray takes beyond one of `--local`, as a share of the latter."""
    runs = {}
    with ExitStack() as stack:
        for name, arguments in {"ray": (), "local": ("--local",)}.items():
            job = _job(folder, model, rows, options, f"turns-{name}", 10_000)
            run = Run(start(folder, job, *arguments), folder / "runs" / f"turns-{name}")
            runs[name] = [stack.enter_context(run)]
            run.reach(WARM_UP)
            run.pause()
        rates = by_turns(runs, options.rounds)
    return ratio(rates, "local", "ray") - 1


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
    command += [str(model), str(rows), setting, *numbers]
    return finish(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    )


def _matmul_rate(dtype: str) -> float:
    """The machine's matrix-product rate in a dtype, in floating-point operations per second."""
    import torch

    size = 1024
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(7):
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
