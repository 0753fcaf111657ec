"""A plan for a person."""

from orchestrator.plan.planner import Plan
from orchestrator.plan.sizes import show_bytes

_WORDS = {
    "base": "4-bit base and dense parts",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits",
    "overhead": "framework",
    "total": "total",
}


def describe(plan: Plan) -> str:
    """The plan in a few lines."""
    details = plan.details
    on = "GPU" if details["device"] == "cuda" else "CPU"
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"{details['model']}: {details['parameters'] / 1e9:.2f}B parameters, "
        f"{details['trainable_parameters'] / 1e6:.1f}M trained",
        f"{verdict}: {show_bytes(plan.per_gpu_bytes['total'])} of {show_bytes(plan.gpu_bytes)} "
        f"on each {on}",
    ]
    for name, words in _WORDS.items():
        lines.append(f"  {words:<28}{show_bytes(plan.per_gpu_bytes[name]):>12}")
    experts = details["unquantized_experts_bytes"]
    if experts:
        lines.append(f"{show_bytes(experts)} of it are fused experts, which stay unquantized")
    recomputed = "on" if details["gradient_checkpointing"] else "off"
    lines.append(
        f"tokens per pass {plan.tokens_per_pass}, gradient checkpointing {recomputed}, "
        f"up to {plan.concurrent_trials} trials at once"
    )
    lines.append(f"disk {show_bytes(plan.disk_bytes)}")
    if details["tokens_per_second"]:
        pace = f"about {details['tokens_per_second']:.0f} tokens/s"
        if details["seconds_at_most"]:
            pace += f", {details['seconds_at_most'] / 60:.0f} minutes at most"
        lines.append(pace)
    if plan.advice:
        lines.append("to make it fit: " + " ".join(f"--set {change}" for change in plan.advice))
    elif not plan.fits:
        lines.append("no setting of this job makes it fit; take a smaller model or a larger GPU")
    return "\n".join(lines)
