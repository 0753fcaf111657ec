"""Two workers beside one on this machine: speed, bytes, start, recovery; prints one JSON line.

    python -m tests.benchmarks.scaling [--rows FILE] [--steps N] [--batch N] [--rank N]

Every worker computes on one core, through Ray Train, and all runs train on the same rows; the
first steps are not counted. `machine_efficiency` is what two runs that do not know of each other
reach at once: what the machine itself allows.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.config import CheckpointConfig
from tests.benchmarks.material import finish, journal, start, write_model, write_rows

# Steps that are not counted: caches fill, and our MLflow store is made meanwhile.
WARM_UP = 2
# Runs of each kind, in turns, since the machine's speed drifts; the faster one counts.
ROUNDS = 2
ONE_CORE = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Bench:
    """Where the runs lie and what they train on."""

    folder: Path
    model: Path
    rows: Path
    options: argparse.Namespace

    def start(self, name: str, workers: int, *arguments: str, every: int = 2) -> Any:
        """Start a run of so many workers on a Ray cluster of its own."""
        job = {
            "name": name,
            "output_dir": str(self.folder / "runs"),
            "model": {"base": str(self.model)},
            "lora": {"rank": self.options.rank, "alpha": 2 * self.options.rank},
            "data": {"train": str(self.rows), "validation": None, "max_length": 1024},
            "training": {
                "max_steps": self.options.steps,
                "batch_size": self.options.batch,
                "learning_rate": 2e-4,
                "gradient_checkpointing": False,
            },
            "evaluation": {"samples": 0},
            "checkpoint": {"every": every},
            "cluster": {"address": "local", "workers": workers, "collective_timeout": 60},
        }
        return start(self.folder, job, *arguments, **ONE_CORE)

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        """A run's events of one kind so far."""
        return [e for e in journal(self.folder / "runs" / name) if e["event"] == kind]

    def seconds(self, name: str) -> float:
        """What the counted steps of a run took."""
        return sum(step["seconds"] for step in self.events(name, "step")[WARM_UP:])

    def wait(self, process: Any, true: Callable[[], bool]) -> None:
        """Until something is so, while the run goes on."""
        while not true():
            if process.poll() is not None:
                finish(process)
                raise SystemExit(f"{process.args} ended before its time")
            time.sleep(0.01)

    def reach(self, process: Any, name: str, step: int) -> None:
        """Until a run has done a step."""
        self.wait(process, lambda: len(self.events(name, "step")) >= step)


def main() -> None:
    """Measure, and print the line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder / "rows.jsonl", 4 * options.steps * options.batch, options.rows)
        bench = Bench(folder, write_model(folder / "model"), rows, options)
        results = {**_in_turns(bench), **_recovery(bench)}
        print(json.dumps({**results, "cores": os.cpu_count()}))


def _in_turns(bench: Bench) -> dict[str, Any]:
    """One worker and two, in turns; then runs without Ray, alone and two at once."""
    first_step, sent = {}, 0.0
    for number in range(ROUNDS):
        began = time.time()
        finish(bench.start(f"one{number}", 1))
        # The first run quantizes the base, the others find it in the store.
        words = "quantizing" if number == 0 else "base_in_store"
        first_step[words] = bench.events(f"one{number}", "step")[0]["time"] - began
        sent = _run_two(bench, f"two{number}")
    finish(bench.start("alone", 1, "--local"))
    for process in [bench.start(f"beside{number}", 1, "--local") for number in range(2)]:
        finish(process)
    one = min(bench.seconds(f"one{number}") for number in range(ROUNDS))
    two = min((f"two{number}" for number in range(ROUNDS)), key=bench.seconds)
    steps = bench.events(two, "step")[WARM_UP:]
    tokens, seconds = sum(step["tokens"] for step in steps), bench.seconds(two)
    beside = statistics.mean(bench.seconds(f"beside{number}") for number in range(2))
    adapter = 4 * bench.events(two, "start")[0]["trainable_parameters"]
    return {
        "tokens_per_second": {"one_worker": tokens / one, "two_workers": tokens / seconds},
        "efficiency": one / seconds / 2,
        "machine_efficiency": bench.seconds("alone") / beside,
        "collective_share": sum(step["collective_seconds"] for step in steps) / seconds,
        "bytes_sent_per_step": sent,
        "adapter_bytes": adapter,
        "seconds_to_first_step": first_step,
        "checkpoint": _checkpoint(bench, two),
    }


def _run_two(bench: Bench, name: str) -> float:
    """A run of two workers; returns the bytes that the one that does not lead sends in a step."""
    process = bench.start(name, 2)
    bench.reach(process, name, WARM_UP)
    follower = _follower(process)
    before = follower.io_counters().write_chars
    last = bench.options.steps - 1
    bench.reach(process, name, last)
    sent = (follower.io_counters().write_chars - before) / (last - WARM_UP)
    finish(process)
    return sent


def _checkpoint(bench: Bench, name: str) -> dict[str, float]:
    """What a checkpoint takes, and its share of the steps between two of a default job."""
    seconds = statistics.median(e["seconds"] for e in bench.events(name, "checkpoint"))
    step = statistics.median(e["seconds"] for e in bench.events(name, "step"))
    return {
        "seconds": seconds,
        "share_of_steps": seconds / (seconds + CheckpointConfig().every * step),
    }


def _recovery(bench: Bench) -> dict[str, float]:
    """Seconds from the kill of a worker to the end of the next step that was not there before."""
    process = bench.start("killed", 2, every=1)
    bench.reach(process, "killed", WARM_UP + 1)
    done = len(bench.events("killed", "step"))
    killed = time.time()
    _follower(process).kill()
    bench.reach(process, "killed", done + 1)
    after = bench.events("killed", "step")[done]
    process.terminate()
    process.communicate()
    return {
        "seconds_from_death_to_next_step": after["time"] - killed,
        "of_which_step": after["seconds"],
    }


def _follower(process: subprocess.Popen[str]) -> psutil.Process:
    """The worker that does not lead: it holds no journal open."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if "RayTrainWorker" in " ".join(child.cmdline()) and not any(
            file.path.endswith("journal.jsonl") for file in child.open_files()
        ):
            return child
    raise SystemExit("The run has no second worker")


if __name__ == "__main__":
    main()
