"""A plan for a person."""

import math
from collections.abc import Iterator
from typing import Any

from orchestrator.plan.planner import Plan
from orchestrator.plan.sizes import show_bytes

_WORDS = {
    "base": "base",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits",
    "overhead": "framework",
    "total": "total",
}
# Lines under a part: what it holds, or would hold.
_WITHIN = {
    "base": {"packed": "4-bit weights", "constants": "constants", "dense": "dense parts"},
    "activations": {
        "activations_with_checkpointing": "with checkpointing",
        "activations_without_checkpointing": "without checkpointing",
        "largest_dequantized_bytes": "dequantized layer",
        "collective_bytes": "collective buffer",
    },
    "logits": {"logits_chunk_bytes": "a chunk"},
}
_DISK = {
    "base_store": "base",
    "shared_base": "its copy for other nodes",
    "data": "tokenized data",
    "checkpoints": "checkpoints",
    "adapter": "adapters",
}


def describe(plan: Plan) -> str:
    """The plan in a few lines."""
    details, parts = plan.details, plan.per_gpu_bytes
    on = "GPU" if details["device"] == "cuda" else "CPU"
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"{details['model']}: {details['parameters'] / 1e9:.2f}B parameters, "
        f"{details['trainable_parameters'] / 1e6:.1f}M trained",
        f"{verdict}: {show_bytes(parts['total'])} of {show_bytes(plan.gpu_bytes)} on each {on}",
    ]
    for name, words in _WORDS.items():
        lines.append(f"  {words:<24}{show_bytes(parts[name]):>12}")
        lines += _within(details, name)
    experts = details["unquantized_experts_bytes"]
    if experts:
        lines.append(f"{show_bytes(experts)} of the base are fused experts, which stay unquantized")
    recomputed = "on" if details["gradient_checkpointing"] else "off"
    lines.append(
        f"counted with {_adapters(details['trials'])} of rank {details['rank']}, "
        f"{plan.tokens_per_pass} tokens per pass, gradient checkpointing {recomputed}"
    )
    if details["processes"] > 1:
        lines.append(f"{details['processes']} such processes share the CPUs")
    if plan.concurrent_trials:
        lines.append(f"room for {_adapters(plan.concurrent_trials)} at once over this base")
    disk = [f"{show_bytes(size)} {_DISK[name]}" for name, size in details["disk"].items() if size]
    lines.append(f"disk: {', '.join(disk)}")
    if details["tokens_per_second"]:
        pace = f"about {details['tokens_per_second']:.0f} tokens/s"
        if details["seconds"]:
            minutes = math.ceil(details["seconds"] / 60)
            pace += f": {minutes} minutes of training for {details['seconds_rest_on']}"
        lines.append(pace)
    if not plan.fits:
        lines.append(_remedy(plan))
    return "\n".join(lines)


def refusal(plan: Plan) -> str:
    """Why a job is not begun: the numbers, and what would make it fit."""
    parts = plan.per_gpu_bytes
    largest = sorted((n for n in parts if n != "total"), key=lambda n: -parts[n])[:4]
    listed = ", ".join(f"{_WORDS[name]} {show_bytes(parts[name])}" for name in largest)
    on = "GPU" if plan.details["device"] == "cuda" else "process"
    return (
        f"The job does not fit: it takes {show_bytes(parts['total'])} of the "
        f"{show_bytes(plan.gpu_bytes)} that each {on} has here ({listed}). {_remedy(plan)}"
    )


def _within(details: dict[str, Any], part: str) -> Iterator[str]:
    for name, words in _WITHIN.get(part, {}).items():
        size = {**details, **details["base_bytes"]}.get(name)
        if size:
            yield f"    {words:<22}{show_bytes(size):>12}"


def _adapters(count: int) -> str:
    return "1 adapter" if count == 1 else f"{count} adapters"


def _remedy(plan: Plan) -> str:
    if plan.advice:
        return "To make it fit: " + " ".join(f"--set {change}" for change in plan.advice)
    return "No setting of this job makes it fit; take a smaller model or a larger device"
