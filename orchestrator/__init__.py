"""QLoRA fine-tuning on many GPUs, orchestrated by Ray.

In a notebook:

    from orchestrator import finetune

    result = finetune("job.yaml", overrides=["lora.rank=8"], local=True)
"""

from typing import Any

__all__ = ["finetune", "load_job"]


def __getattr__(name: str) -> Any:
    """Import on first use: reading a job file needs neither torch nor Ray."""
    if name == "finetune":
        from orchestrator.api import finetune

        return finetune
    if name == "load_job":
        from orchestrator.jobfile import load_job

        return load_job
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
