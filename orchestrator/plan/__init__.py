"""Before a launch: bytes, budgets, trials and time of a job, without loading any weights.

Knows job files and transformers' model classes, which it builds on torch's meta device; knows
nothing of the rooms that do the work. That it mirrors them is what its tests hold.
"""

from orchestrator.plan.at_hand import runs_that_fit, trials_that_fit, workers_that_fit
from orchestrator.plan.machine import Gpu, describe_gpu
from orchestrator.plan.planner import Plan, plan_job, unfit_trial
from orchestrator.plan.show import describe, refusal
from orchestrator.plan.sizes import parse_bytes

__all__ = [
    "Gpu",
    "Plan",
    "describe",
    "describe_gpu",
    "parse_bytes",
    "plan_job",
    "refusal",
    "runs_that_fit",
    "trials_that_fit",
    "unfit_trial",
    "workers_that_fit",
]
