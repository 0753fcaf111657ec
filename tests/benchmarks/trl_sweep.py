"""The rival of our sweeps: Ray Tune with one TRL SFTTrainer per trial, as its examples have it.

    python -m tests.benchmarks.trl_sweep MODEL ROWS HELD_OUT STEPS EVERY BATCH RANKS RATES

RANKS and RATES are comma-separated. A trial has one CPU, so as many run at a time as there are
cores. Prints one JSON line: seconds, peak_bytes of all trials together, eval_losses.
"""

import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from tests.benchmarks.held import Held


def train(config: dict[str, Any], model: str, rows: str, held_out: str, about: list[int]) -> None:
    """One trial: a base of its own, quantized anew."""
    from ray import tune
    from transformers import TrainerCallback

    from orchestrator.processor import has_bfloat16
    from tests.benchmarks.trl_runner import conversations, make_trainer

    class Report(TrainerCallback):
        def on_evaluate(self, *_, metrics, **__):
            tune.report({"eval_loss": metrics["eval_loss"]})

    steps, every, batch = about
    make_trainer(
        model,
        conversations(Path(rows)),
        # TRL's own default takes ten times as long where the processor has no bfloat16.
        "default" if has_bfloat16() else "float32",
        batch,
        config["rank"],
        Report(),
        max_steps=steps,
        learning_rate=config["rate"],
        eval_strategy="steps",
        eval_steps=every,
        eval_rows=conversations(Path(held_out)),
        output_dir=str(Path.cwd() / "trl"),
    ).train()


def main() -> None:
    """Search and print the line."""
    import logging

    import ray
    from ray import tune

    model, rows, held_out, steps, every, batch, ranks, rates = sys.argv[1:]
    space = {
        "rank": tune.grid_search([int(rank) for rank in ranks.split(",")]),
        "rate": tune.grid_search([float(rate) for rate in rates.split(",")]),
    }
    about = [int(steps), int(every), int(batch)]
    began = time.perf_counter()
    # A trial's process works in a folder of its own, where these modules are not.
    paths = {"env_vars": {"PYTHONPATH": str(Path.cwd())}}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env=paths)
    trainable = tune.with_parameters(train, model=model, rows=rows, held_out=held_out, about=about)
    with Held() as held:
        found = tune.Tuner(
            tune.with_resources(trainable, {"CPU": 1}),
            param_space=space,
            run_config=tune.RunConfig(storage_path=str(Path(rows).parent / "tune"), verbose=0),
        ).fit()
    seconds = time.perf_counter() - began
    if found.errors:
        raise SystemExit(f"A trial failed: {found.errors[0]}")
    losses = [result.metrics["eval_loss"] for result in found]
    assert len(losses) == len(list(product(ranks.split(","), rates.split(",")))), losses
    print(json.dumps({"seconds": seconds, "peak_bytes": held.peak, "eval_losses": losses}))


if __name__ == "__main__":
    main()
