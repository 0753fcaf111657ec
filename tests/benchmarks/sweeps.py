"""A sweep shared by us, isolated by us, and as Ray Tune with one TRL trainer per trial.

    python -m tests.benchmarks.sweeps [--rows FILE] [--steps N] [--batch N] [--skip PART]...

16 trials, 4 ranks by 4 learning rates, the same steps each: makespan from the command to its end,
peak memory of all that train, the best trial's eval loss; then shared with ASHA; then what each
further tenant of a base costs. Prints one JSON line. The machine is noisy: read the ratios.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.held import Held
from tests.benchmarks.material import finish, start, write_model, write_rows

RANKS = (4, 8, 16, 32)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
HELD_OUT = 8
TENANTS = (1, 4, 8)


def main() -> None:
    """Run every contestant and print the line."""
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # One epoch: each contestant shuffles by itself, and all train on the same examples.
        count = options.steps * options.batch
        rows = write_rows(folder / "all.jsonl", count + HELD_OUT, options.rows)
        lines = rows.read_text().splitlines(keepends=True)
        (folder / "held_out.jsonl").write_text("".join(lines[:HELD_OUT]))
        (folder / "rows.jsonl").write_text("".join(lines[HELD_OUT:]))
        write_model(folder / "model")
        _warm(folder, options)
        found = {
            name: run(folder, options) for name, run in _PARTS.items() if name not in options.skip
        }
        print(json.dumps(_report(found, options)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--skip", action="append", default=[], choices=list(_PARTS))
    return parser.parse_args()


def _report(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    report = {**found, "steps": options.steps, "batch": options.batch}
    rival, ours = found.get("tune_trl"), found.get("shared")
    if rival and ours:
        report["speedup_over_tune_trl"] = rival["seconds"] / ours["seconds"]
        report["best_eval_loss_over_tune_trl"] = ours["eval_loss"] / rival["eval_loss"]
        report["memory_over_tune_trl"] = ours["peak_bytes"] / rival["peak_bytes"]
    if rival and "asha" in found:
        report["speedup_with_asha_over_tune_trl"] = rival["seconds"] / found["asha"]["seconds"]
    if ours and "isolated" in found:
        report["speedup_over_isolated"] = found["isolated"]["seconds"] / ours["seconds"]
    return report


def _warm(folder: Path, options: argparse.Namespace) -> None:
    """Quantize and tokenize once, as every later run finds it."""
    job = _job(folder, "warm", options, {"trials": 1, "search_space": _space((4,), (1e-4,))})
    job["training"]["max_steps"] = 1
    finish(start(folder, job, command="sweep"))


def _shared(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    return _sweep(folder, options, "shared", options.steps // 2)


def _isolated(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    return _sweep(folder, options, "isolated", options.steps // 2, placement="isolated")


def _asha(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    return _sweep(folder, options, "asha", options.steps // 6, scheduler="asha")


def _tenants(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of so many tenants of rank 16 at once, and what each further one adds."""
    peaks = {}
    for count in TENANTS:
        rates = tuple(1e-4 * (1 + place) for place in range(count))
        sweep = {"trials": count, "concurrent": count, "search_space": _space((16,), rates)}
        job = _job(folder, f"of{count}", options, sweep)
        job["cluster"]["workers"] = 1
        peaks[count] = _measured(folder, job)["peak_bytes"]
    slope = (peaks[TENANTS[-1]] - peaks[TENANTS[0]]) / (TENANTS[-1] - TENANTS[0])
    return {"peak_bytes": peaks, "bytes_per_tenant": slope}


def _trl(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    files = [str(folder / name) for name in ("model", "rows.jsonl", "held_out.jsonl")]
    numbers = [options.steps, options.steps // 2, options.batch]
    lists = [",".join(map(str, RANKS)), ",".join(map(str, RATES))]
    command = [sys.executable, "-m", "tests.benchmarks.trl_sweep", *files, *map(str, numbers)]
    process = subprocess.Popen(
        [*command, *lists], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    result = finish(process)
    return {**result, "eval_loss": min(result.pop("eval_losses"))}


# In the order in which they run.
_PARTS = {
    "shared": _shared,
    "tune_trl": _trl,
    "isolated": _isolated,
    "asha": _asha,
    "tenants": _tenants,
}


def _sweep(
    folder: Path, options: argparse.Namespace, name: str, every: int, **settings: Any
) -> dict[str, Any]:
    space = {"search_space": _space(RANKS, RATES), "trials": len(RANKS) * len(RATES)}
    job = _job(folder, name, options, {**space, **settings})
    job["evaluation"]["every"] = every
    return _measured(folder, job)


def _measured(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    with Held() as held:
        result = finish(start(folder, job, command="sweep"))
    seconds = time.perf_counter() - began
    states = [trial["status"] for trial in result["trials"]]
    return {
        "seconds": seconds,
        "peak_bytes": held.peak,
        "eval_loss": result["best"]["eval_loss"],
        "trials": {state: states.count(state) for state in set(states)},
        "steps": sum(trial["steps"] for trial in result["trials"]),
    }


def _job(
    folder: Path, name: str, options: argparse.Namespace, sweep: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"base": str(folder / "model")},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "validation": str(folder / "held_out.jsonl"),
            "max_length": 1024,
        },
        "lora": {"rank": 16, "alpha": 32},
        "training": {"max_steps": options.steps, "batch_size": options.batch},
        "evaluation": {"every": options.steps, "samples": 0},
        "cluster": {"address": "local"},
        "sweep": {"searcher": "grid", "scheduler": "none", **sweep},
    }


def _space(ranks: tuple[int, ...], rates: tuple[float, ...]) -> dict[str, Any]:
    return {
        "lora.rank": {"choice": list(ranks)},
        "training.learning_rate": {"choice": list(rates)},
    }


if __name__ == "__main__":
    main()
