"""What a finished fine-tune or sweep tells the user at its end."""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.config import JobConfig
from orchestrator.sweep.report.table import rank
from orchestrator.sweep.words import (
    counted,
    duration,
    measured,
    metric_name,
    short_labels,
    shown,
)

# The report shows all.
_TRIALS_SHOWN = 20
_ERRORS_SHOWN = 3


def show(job: JobConfig, ui_command: str, results: dict[str, Any], console: Console) -> None:
    """Eval loss and answers before and after, where the adapter lies, how to open the UI."""
    _show_samples(job.run_dir / "samples.jsonl", console)
    before, after = results.get("initial_eval_loss"), results.get("eval_loss")
    if before is not None and after is not None:
        console.print(f"Eval loss    {before:.4f} before, {after:.4f} after")
    rate = results.get("tokens_per_second")
    if rate:
        memory = results["peak_memory_bytes"] / 2**30
        console.print(
            f"Trained      {results['steps']} steps, {results['tokens']:,} tokens, "
            f"{rate:.0f} tokens/s, {memory:.1f} GiB at the peak, {results['restarts']} restarts"
        )
    console.print(f"Adapter      {results['adapter']}", soft_wrap=True, markup=False)
    if results.get("model_version"):
        console.print(
            f"Registered   {job.tracking.registered_model}, version {results['model_version']}"
        )
    console.print(f"MLflow UI    {ui_command}", soft_wrap=True, markup=False)


def show_sweep(job: JobConfig, ui_command: str, results: dict[str, Any], console: Console) -> None:
    """The trials, best first, the best one's job file and adapter, how to open the UI."""
    assert job.sweep is not None
    metric, mode, best = job.sweep.metric, job.sweep.mode, results["best"]
    trials = sorted(results["trials"], key=lambda trial: rank(trial, metric, mode))
    console.print(_trial_table(job.name, metric, trials, best["trial_id"]), markup=False)
    if len(trials) > _TRIALS_SHOWN:
        console.print(f"and {len(trials) - _TRIALS_SHOWN} more; the report has them all")
    for trial in [trial for trial in trials if trial["error"]][:_ERRORS_SHOWN]:
        line = f"{trial['trial_id']} failed: {trial['error']}"
        console.print(line, soft_wrap=True, markup=False)
    console.print(
        f"Trials       {counted([trial['status'] for trial in trials])}, "
        f"{duration(results['seconds'])} for all"
    )
    console.print(
        f"Best         {best['trial_id']}, {metric_name(metric)} {measured(best[metric])}"
    )
    console.print(f"Job file     {best['job']}", soft_wrap=True, markup=False)
    console.print(f"Adapter      {results['adapter']}", soft_wrap=True, markup=False)
    console.print(f"Report       {results['report']}", soft_wrap=True, markup=False)
    if results.get("model_version"):
        console.print(
            f"Registered   {job.tracking.registered_model}, version {results['model_version']}"
        )
    console.print(f"MLflow UI    {ui_command}", soft_wrap=True, markup=False)


def _trial_table(name: str, metric: str, trials: list[dict[str, Any]], best: str) -> Table:
    """The best of the trials; cells are texts, for values are the user's own."""
    keys = list(trials[0]["params"]) if trials else []
    table = Table(title=Text(f"Trials of {name}"), expand=False)
    for heading in ("trial", *short_labels(keys).values()):
        table.add_column(heading, overflow="fold")
    measures = list(dict.fromkeys(("eval_loss", metric)))
    for heading in ("steps", *map(metric_name, measures), "time"):
        table.add_column(heading, justify="right")
    table.add_column("state")
    for trial in trials[:_TRIALS_SHOWN]:
        cells = [
            trial["trial_id"],
            *(shown(trial["params"][key]) for key in keys),
            str(trial["steps"]),
            *(measured(trial[measure]) for measure in measures),
            duration(trial["seconds"]),
            trial["status"],
        ]
        style = "bold" if trial["trial_id"] == best else ""
        table.add_row(*map(Text, cells), style=style)
    return table


def _show_samples(path: Path, console: Console) -> None:
    if not path.exists():
        return
    answers: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        sample = json.loads(line)
        answers.setdefault(sample["index"], sample)[sample["when"]] = sample["answer"]
    if not answers:
        return
    table = Table(title="Answers to held-out prompts", show_lines=True, expand=False)
    for heading in ("prompt", "before", "after", "reference"):
        table.add_column(heading, overflow="fold", max_width=40)
    shared = _shared_ends([sample["prompt"] for sample in answers.values()])
    for _, sample in sorted(answers.items()):
        prompt = sample["prompt"][shared[0] : len(sample["prompt"]) - shared[1]]
        cells = (prompt, sample.get("before"), sample.get("after"), sample["reference"])
        table.add_row(*(_short(cell) for cell in cells))
    console.print(table, markup=False)


def _shared_ends(prompts: list[str]) -> tuple[int, int]:
    """Characters that all prompts begin and end with: the template, not the question."""
    if len(prompts) < 2:
        return 0, 0
    head = _alike(prompts)
    tail = _alike([prompt[head:][::-1] for prompt in prompts])
    return head, tail


def _alike(texts: list[str]) -> int:
    """Characters that all texts begin with."""
    columns = zip(*texts, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _short(text: str | None) -> str:
    flat = " ".join((text or "").split())
    return flat if len(flat) <= 160 else f"{flat[:78]} ... {flat[-78:]}"
