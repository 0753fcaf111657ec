"""Two workers beside one on this machine: speed, bytes, start, recovery; prints one JSON line.

    python -m tests.benchmarks.scaling [--rows FILE] [--rounds N] [--batch N] [--rank N]

Every worker computes on one core, through Ray Train, and all runs train on the same rows, by turns:
the ratios are medians over the rounds. `machine_efficiency` is what two runs that do not know of
each other, and nothing of Ray, reach at once: what the machine itself allows.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.config import CheckpointConfig
from tests.benchmarks.material import journal, start, write_model, write_rows
from tests.benchmarks.turns import Run, by_turns, ratio

# Steps before the first turn: caches fill, and our MLflow store is made meanwhile.
WARM_UP = 3
# More than a run comes to.
_MANY = 10_000
_SENT_STEPS = 5
ONE_CORE = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Bench:
    """Where the runs lie and what they train on."""

    folder: Path
    model: Path
    rows: Path
    options: argparse.Namespace

    def start(self, name: str, workers: int, *arguments: str, every: int = _MANY) -> Run:
        """Start a run of so many workers on a Ray cluster of its own."""
        job = {
            "name": name,
            "output_dir": str(self.folder / "runs"),
            "model": {"base": str(self.model)},
            "lora": {"rank": self.options.rank, "alpha": 2 * self.options.rank},
            "data": {"train": str(self.rows), "validation": None, "max_length": 1024},
            "training": {
                "max_steps": _MANY,
                "batch_size": self.options.batch,
                "learning_rate": 2e-4,
                "gradient_checkpointing": False,
            },
            "evaluation": {"samples": 0},
            "checkpoint": {"every": every},
            # A worker that stands still is none that hangs.
            "cluster": {"address": "local", "workers": workers, "collective_timeout": 3600},
        }
        return Run(start(self.folder, job, *arguments, **ONE_CORE), self.folder / "runs" / name)


def main() -> None:
    """Measure, and print the line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder / "rows.jsonl", 100 * options.batch, options.rows)
        bench = Bench(folder, write_model(folder / "model"), rows, options)
        results = {**_by_turns(bench), **_recovery(bench)}
        print(json.dumps({**results, "cores": os.cpu_count()}))


def _by_turns(bench: Bench) -> dict[str, Any]:
    """One worker and two; then, without Ray, one run and two at once."""
    first_step = {}
    with ExitStack() as stack:

        def warm(name: str, workers: int, *arguments: str) -> tuple[Run, float]:
            """A run that stands still after its first steps, and seconds to the first."""
            began = time.time()
            run = stack.enter_context(bench.start(name, workers, *arguments))
            run.reach(WARM_UP)
            run.pause()
            return run, run.steps()[0]["time"] - began

        # The first run quantizes the base, the others find it in the store.
        one, first_step["quantizing"] = warm("one", 1)
        two, first_step["base_in_store"] = warm("two", 2)
        beside = [warm(f"beside{number}", 1, "--local")[0] for number in range(2)]
        contestants = {"one": [one], "two": [two], "alone": beside[:1], "beside": beside}
        rates = by_turns(contestants, bench.options.rounds)
        two.resume()
        sent = _sent(two)
    steps = two.steps()[WARM_UP:]
    start = next(event for event in journal(two.folder) if event["event"] == "start")
    return {
        "tokens_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "efficiency": ratio(rates, "two", "one") / 2,
        "machine_efficiency": ratio(rates, "beside", "alone") / 2,
        "collective_share": statistics.median(
            step["collective_seconds"] / step["seconds"] for step in steps
        ),
        "bytes_sent_per_step": sent,
        "adapter_bytes": 4 * start["trainable_parameters"],
        "seconds_to_first_step": first_step,
    }


def _sent(run: Run) -> float:
    """Bytes that the worker which does not lead sends in a step."""
    follower, done = _follower(run.process), len(run.steps())
    # From one step's end to another's: of the first, part was done before.
    run.reach(done + 1)
    before = follower.io_counters().write_chars
    run.reach(done + 1 + _SENT_STEPS)
    return (follower.io_counters().write_chars - before) / _SENT_STEPS


def _checkpoint(run: Run) -> dict[str, float]:
    """What a checkpoint takes, and its share of the steps between two of a default job."""
    events = journal(run.folder)
    seconds = statistics.median(e["seconds"] for e in events if e["event"] == "checkpoint")
    step = statistics.median(e["seconds"] for e in events if e["event"] == "step")
    return {
        "seconds": seconds,
        "share_of_steps": seconds / (seconds + CheckpointConfig().every * step),
    }


def _recovery(bench: Bench) -> dict[str, Any]:
    """Seconds from the kill of a worker to the end of the next step that was not there before.

    And what the checkpoints of that run took.
    """
    with bench.start("killed", 2, every=1) as run:
        run.reach(WARM_UP)
        done = len(run.steps())
        killed = time.time()
        _follower(run.process).kill()
        run.reach(done + 1)
        after = run.steps()[done]
    return {
        "seconds_from_death_to_next_step": after["time"] - killed,
        "of_which_step": after["seconds"],
        "checkpoint": _checkpoint(run),
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
