"""How many workers a job gets on a cluster."""

import pytest

from orchestrator.cluster.plan import Resources, places, plan_workers, told_nodes
from orchestrator.config import ClusterConfig
from orchestrator.errors import RefusedError

HEAD = Resources(cpus=8, gpus=0)
GPU_NODE = Resources(cpus=8, gpus=4)


def test_auto_takes_every_gpu_there_is() -> None:
    plan = plan_workers(ClusterConfig(), [HEAD, GPU_NODE, GPU_NODE], None, own=False)
    assert plan.workers == 8 and not plan.elastic and not plan.waits
    assert plan.resources == {"CPU": 1, "GPU": 1}


def test_auto_takes_one_cpu_worker_with_all_cores_where_there_is_no_gpu() -> None:
    plan = plan_workers(ClusterConfig(), [HEAD], None, own=True)
    assert plan.workers == 1 and plan.threads == 8 and plan.resources == {"CPU": 1}


def test_auto_begins_with_the_first_gpu_that_an_autoscaler_adds() -> None:
    plan = plan_workers(ClusterConfig(), [HEAD], [Resources(100, 16)], own=False)
    assert plan.workers == (1, 16) and plan.elastic and plan.least == 1 and plan.waits


def test_what_a_cluster_may_grow_to_is_told_in_a_few_words() -> None:
    assert told_nodes("2xCPU=64, GPU=8") == (Resources(64, 8), Resources(64, 8))
    assert told_nodes("GPU=8") == (Resources(0, 8),)
    for wrong in ("64", "CPU=much", "TPU=4", "CPU=-1", "", "0xGPU=1", "manyxGPU=1"):
        with pytest.raises(RefusedError, match="8xCPU=16,GPU=1"):
            told_nodes(wrong)


def test_a_worker_larger_than_any_node_to_come_is_refused() -> None:
    config = ClusterConfig(workers=2, cpus_per_worker=16)
    with pytest.raises(RefusedError, match="whose nodes hold 0 of them"):
        plan_workers(config, [HEAD], told_nodes("10xCPU=8,GPU=1"), own=False)
    assert plan_workers(config, [HEAD], told_nodes("2xCPU=16,GPU=1"), own=False).waits


def test_an_elastic_job_may_ask_for_more_than_there_is_but_not_as_its_least() -> None:
    plan = plan_workers(ClusterConfig(workers=(2, 64)), [GPU_NODE], None, own=False)
    assert plan.workers == (2, 64) and not plan.waits
    with pytest.raises(RefusedError, match="8 CPUs and 4 GPUs"):
        plan_workers(ClusterConfig(workers=(5, 64)), [GPU_NODE], None, own=False)


def test_what_only_the_sum_of_the_nodes_could_hold_is_refused() -> None:
    """Eight CPUs on each of two nodes hold no worker of sixteen."""
    small = Resources(cpus=8, gpus=2)
    job = ClusterConfig(workers=1, cpus_per_worker=16)
    with pytest.raises(RefusedError, match="whose nodes hold 0 of them"):
        plan_workers(job, [small, small], None, own=False)
    # An autoscaler may add a larger one.
    assert plan_workers(job, [small, small], [Resources(64, 16)], own=False).waits


@pytest.mark.parametrize(("share", "held"), [(0.1, 10), (0.3, 3), (1.0, 1), (2.0, 0)])
def test_shares_of_a_gpu(share: float, held: int) -> None:
    assert places([{"CPU": 16, "GPU": 1}], {"CPU": 1, "GPU": share}) == held


@pytest.mark.parametrize(("asked", "threads"), [((1, 2), 4), ((1, 9), 1), ((2, 2), 4), (2, 4)])
def test_an_own_rays_cores_are_shared_by_all_that_start(
    asked: int | tuple[int, int], threads: int
) -> None:
    config = ClusterConfig(workers=asked, gpus_per_worker=0)
    plan = plan_workers(config, [Resources(8, 0)], None, own=True)
    assert plan.threads == threads
