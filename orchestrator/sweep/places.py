"""How many trials are trained at a time, and with what each. Pure but for the plan it asks."""

from dataclasses import replace

from orchestrator.cluster.plan import Resources, WorkerPlan, plan_workers
from orchestrator.cluster.session import Session
from orchestrator.config import ClusterConfig, JobConfig, SweepConfig
from orchestrator.errors import RefusedError
from orchestrator.plan import Gpu, runs_that_fit, trials_that_fit, workers_that_fit
from orchestrator.plan.fit import trials_at_once


def cluster_of(job: JobConfig, here: Session) -> ClusterConfig:
    """The job's cluster; a worker for each trial at a time where it leaves that to our own CPUs.

    Two threads of a step wait for one another in each of its operations, two processes never: on
    two cores two workers trained 1.3 times as many tokens as one.
    """
    cluster = job.cluster
    on_gpu = here.here.gpus if cluster.gpus_per_worker == "auto" else cluster.gpus_per_worker
    if cluster.workers != "auto" or not here.own or on_gpu:
        return cluster
    return cluster.model_copy(update={"workers": workers_that_fit(job, here.here.cpus)})


def shared(job: JobConfig, plan: WorkerPlan, gpu: Gpu | None, own: bool) -> int:
    """Trials at a time as tenants of the workers' bases.

    Args:
        job: the sweep's.
        plan: its workers.
        gpu: what such a GPU has, where one was looked at.
        own: whether the cluster is this machine, for this job alone.
    """
    on_gpu = plan.gpus > 0
    if _sweep(job).concurrent != "auto":
        return trials_at_once(job, on_gpu)
    return max(1, trials_that_fit(job, on_gpu, gpu, plan.workers, own and not on_gpu))


def with_trials_for_all(plan: WorkerPlan, count: int) -> WorkerPlan:
    """Workers of which each trains some of so many trials: a group grows to no more than those."""
    most = max(plan.least, min(plan.most, count))
    return replace(plan, workers=most if most == plan.least else (plan.least, most))


def isolated(job: JobConfig, here: Session) -> tuple[WorkerPlan, int]:
    """What each trial's own run gets, and how many such runs go on at a time.

    Raises:
        RefusedError: the cluster cannot have even one, or not as many as `sweep.concurrent` says.
    """
    sweep, cluster = _sweep(job), job.cluster
    # All GPUs for each trial in turn would leave most of them waiting for a small job's steps.
    workers = 1 if cluster.workers == "auto" else cluster.workers
    plan = plan_workers(
        cluster.model_copy(update={"workers": workers}), here.nodes, here.most, here.own
    )
    there = here.reach
    room = max(1, _runs(plan, there))
    if sweep.concurrent == "auto":
        # More nodes may never come; where there are none yet, some must.
        count = min(sweep.trials, _runs(plan, here.here) or room)
        if here.own and not plan.gpus:
            count = runs_that_fit(job, count, plan.most)
    else:
        count = min(int(sweep.concurrent), sweep.trials)
        if count > room:
            raise RefusedError(
                f"sweep.concurrent: {count} isolated trials of {plan.least} worker(s) each were "
                f"asked for; the cluster has {there}, enough for {room}"
            )
    threads = max(1, int(here.here.cpus // (plan.least * count))) if here.own else plan.threads
    return WorkerPlan(plan.workers, plan.gpus, plan.cpus, threads, plan.waits), count


def _runs(plan: WorkerPlan, there: Resources) -> int:
    by_cpu = there.cpus // (plan.least * plan.cpus)
    return int(min(by_cpu, there.gpus // (plan.least * plan.gpus)) if plan.gpus else by_cpu)


def _sweep(job: JobConfig) -> SweepConfig:
    assert job.sweep is not None
    return job.sweep
