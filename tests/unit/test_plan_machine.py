"""The GPU that a plan is for: looked at here, by another process, or on a worker's machine."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.plan import (
    Gpu,
    at_hand,
    describe_gpu,
    plan_job,
    runs_that_fit,
    speed,
    trials_that_fit,
    unfit_trial,
    workers_that_fit,
)
from orchestrator.plan import machine as machines
from orchestrator.plan.fit import (
    on_one_gpu,
    sharing,
    train_apart,
    trials_at_once,
    trials_each,
)
from orchestrator.plan.machine import CUDA_CONTEXT, machine
from tests.unit.test_plan import GIB, make_job

A100 = Gpu(free=40 * GIB, total=40 * GIB, bfloat16=True)
BASE = "meta-llama/Llama-3.1-8B"
# Nothing to search for.
SET = {"tokens_per_pass": 256, "gradient_checkpointing": True}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of 40 GiB to look at; its attributes say what is found."""
    found = SimpleNamespace(free=30 * GIB, reserved=0, fraction=1.0)
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda: (found.free, 40 * GIB),
        "memory_reserved": lambda: found.reserved,
        "get_per_process_memory_fraction": lambda: found.fraction,
        "is_bf16_supported": lambda including_emulation: True,
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return found


def test_a_process_has_what_is_free_and_what_it_holds(gpu: SimpleNamespace) -> None:
    gpu.reserved = 2 * GIB
    assert describe_gpu() == Gpu(32 * GIB + CUDA_CONTEXT, 40 * GIB, True)
    assert machine(None, None, True).memory == 32 * GIB + CUDA_CONTEXT
    gpu.fraction = 0.5
    assert machine(None, None, True).memory == 20 * GIB + CUDA_CONTEXT


def test_who_shares_a_gpu_gets_a_part_of_what_the_others_left(gpu: SimpleNamespace) -> None:
    # Another job has half of it, and this run has one worker for the other half.
    gpu.free = 20 * GIB - CUDA_CONTEXT
    assert machine(None, None, True, sharing=2, processes=1).memory == 20 * GIB
    # A job of one part has no more than that of an empty GPU.
    gpu.free = 40 * GIB - CUDA_CONTEXT
    assert machine(None, None, True, sharing=2, processes=1).memory == 20 * GIB
    # Two workers of this run, whose contexts are there by now.
    gpu.free = 40 * GIB - 2 * CUDA_CONTEXT
    assert machine(None, None, True, sharing=2, processes=2).memory == 20 * GIB


@pytest.mark.parametrize(
    ("cluster", "parts", "own"),
    [
        ({}, 1, 1),
        ({"gpus_per_worker": 0.5}, 2, 2),
        ({"gpus_per_worker": 0.25, "workers": 2}, 4, 2),
        ({"gpus_per_worker": 0.25, "workers": [1, 8]}, 4, 4),
    ],
)
def test_a_gpu_has_no_more_workers_of_a_job_than_the_job_has(
    cluster: dict[str, object], parts: int, own: int
) -> None:
    job = make_job(BASE, cluster=cluster)
    assert (sharing(job), on_one_gpu(job)) == (parts, own)


def test_trials_are_counted_for_the_gpu_of_a_workers_machine() -> None:
    """The driver's own machine may have none."""
    job = make_job(BASE, lora={"rank": 64}, sweep={"trials": 16})
    assert trials_that_fit(job, True) == trials_at_once(job, True) == 16
    small = Gpu(free=16 * GIB, total=16 * GIB, bfloat16=True)
    assert 0 < trials_that_fit(job, True, small) < trials_that_fit(job, True, A100) <= 16


def test_workers_that_train_apart_are_counted_each() -> None:
    job = make_job(BASE, lora={"rank": 64}, sweep={"trials": 64})
    small = Gpu(free=16 * GIB, total=16 * GIB, bfloat16=True)
    alone = trials_that_fit(job, True, small)
    assert 1 < alone < 16
    # With 16 or more workers each has a trial, with fewer 16 trials are shared out.
    assert [trials_that_fit(job, True, A100, workers) for workers in (4, 16, 32)] == [16, 16, 32]
    assert trials_that_fit(job, True, small, 2) == min(16, 2 * alone)
    few = make_job(BASE, lora={"rank": 64}, sweep={"trials": 3})
    # All workers train each of them.
    assert trials_that_fit(few, True, A100, 8) == 3 and not train_apart(3, 8)
    assert [trials_each(16, workers) for workers in (1, 3, 8, 16, 32)] == [16, 6, 2, 1, 16]


def test_a_worker_for_each_trial_needs_its_part_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = {"trials": 8, "concurrent": 4}
    job = make_job("HuggingFaceTB/SmolLM2-135M", sweep=sweep, training=SET)
    free = 64 * GIB
    for room in (machines, at_hand):
        monkeypatch.setattr(room, "free_bytes", lambda sharing=1: free // sharing)
    assert workers_that_fit(job, 8) == 4
    plan = plan_job(job, calibrate=False)
    count = plan.details["processes"]
    assert count == min(4, os.cpu_count() or 1) and plan.details["trials"] == 4 / count
    # None of them has begun: what a process holds by itself counts for each.
    free = 3 * plan.per_gpu_bytes["total"] + GIB // 16
    assert workers_that_fit(job, 8) in (2, 3)
    free = plan.per_gpu_bytes["total"]
    assert workers_that_fit(job, 8) == 1
    recomputed = job.model_copy(
        update={"training": job.training.model_copy(update={"gradient_checkpointing": "auto"})}
    )
    assert workers_that_fit(recomputed, 8) == 1


def test_trials_of_workers_beside_one_another_share_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = {"trials": 16, "scheduler": "pbt"}
    job = make_job("HuggingFaceTB/SmolLM2-135M", lora={"rank": 256}, sweep=sweep, training=SET)
    free = 8 * GIB
    for room in (machines, at_hand):
        monkeypatch.setattr(room, "free_bytes", lambda sharing=1: free // sharing)
    alone = trials_that_fit(job, False)
    assert 2 < alone < 8
    assert trials_that_fit(job, False, None, 2) == 2 * alone
    assert 2 <= trials_that_fit(job, False, None, 2, here=True) <= alone


def test_a_group_that_may_shrink_has_the_trials_that_its_fewest_workers_hold() -> None:
    job = make_job(BASE, lora={"rank": 64}, sweep={"trials": 64})
    assert trials_that_fit(job, True, A100, (16, 32)) == 32
    small = Gpu(free=16 * GIB, total=16 * GIB, bfloat16=True)
    assert trials_that_fit(job, True, small, (1, 32)) == trials_that_fit(job, True, small)


def test_workers_of_this_machine_share_its_memory_whatever_they_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, free = "HuggingFaceTB/SmolLM2-135M", 64 * GIB
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for room in (machines, at_hand):
        monkeypatch.setattr(room, "free_bytes", lambda sharing=1: free // sharing)

    def job(workers: Any, address: str = "auto", **sweep: Any) -> Any:
        cluster = {"workers": workers, "address": address}
        return make_job(model, cluster=cluster, training=SET, **sweep)

    alone = plan_job(job("auto"))
    free = 3 * alone.per_gpu_bytes["total"]
    # The fine-tune of two workers fits into the halves, that of four not into the quarters.
    assert plan_job(job(2)).fits and not plan_job(job(4)).fits
    # On a cluster that it names they may be on as many machines.
    assert plan_job(job(4, "10.0.0.1:6379")).fits
    assert unfit_trial(job(4), False) is None and unfit_trial(job(4), False, None, 4) is not None
    # Three trials that four workers train together, and as many as one to four workers hold.
    for workers in (4, (1, 4)):
        wide = job(workers, sweep={"trials": 3, "concurrent": 3})
        assert trials_that_fit(wide, False, None, workers) == 3
        assert trials_that_fit(wide, False, None, workers, here=True) == 0


def test_isolated_runs_share_this_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = {"placement": "isolated", "trials": 8, "concurrent": 8}
    job = make_job("HuggingFaceTB/SmolLM2-135M", sweep=sweep, training=SET)
    free = 64 * GIB
    for room in (machines, at_hand):
        monkeypatch.setattr(room, "free_bytes", lambda sharing=1: free // sharing)
    plan = plan_job(job, calibrate=False)
    # Each is a run of one adapter.
    assert plan.details["trials"] == plan.details["processes"] == 1
    assert runs_that_fit(job, 8, 1) == 8
    free = int(4.5 * plan.per_gpu_bytes["total"])
    assert [runs_that_fit(job, most, 1) for most in (0, 1, 2, 8)] == [0, 1, 2, 4]
    assert runs_that_fit(job, 8, 2) == 2


def test_advice_counts_the_workers_that_hold_the_trials() -> None:
    def advised(workers: Any) -> int:
        sweep = {"trials": 64, "concurrent": 32}
        job = make_job(BASE, lora={"rank": 64}, cluster={"workers": workers}, sweep=sweep)
        (advice,) = plan_job(job, 16 * GIB, calibrate=False).advice
        return int(advice.removeprefix("sweep.concurrent="))

    # Where there may be two to eight, the two must hold them.
    assert 4 * advised((2, 8)) == 4 * advised(2) == advised(8)


def test_a_process_that_shares_its_cores_is_no_second_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speed, "product_rate", lambda *_: 1e12)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    threads = 8

    def rate(workers: int) -> Any:
        job = make_job("HuggingFaceTB/SmolLM2-135M", cluster={"workers": workers}, training=SET)
        return plan_job(job).details["tokens_per_second"]

    assert rate(2) == pytest.approx(rate(1))
    threads = 4
    # A worker with half of the cores is one of two that are as fast.
    assert rate(2) == pytest.approx(2 * rate(1))


def test_a_trial_is_refused_by_the_gpu_of_a_workers_machine() -> None:
    job = make_job(BASE, lora={"rank": 256}, training=SET)
    assert unfit_trial(job, True) is None
    assert unfit_trial(job, True, A100) is None
    plan = unfit_trial(job, True, Gpu(free=12 * GIB, total=16 * GIB, bfloat16=True))
    assert plan is not None and not plan.fits
    assert plan.gpu_bytes == 12 * GIB and plan.details["device"] == "cuda"
    old = unfit_trial(job, True, Gpu(free=12 * GIB, total=16 * GIB, bfloat16=False))
    assert old is not None and old.details["compute_dtype"] == "float16"


def test_who_trains_nothing_looks_at_the_gpu_from_another_process(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context would stay until this process ends."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: pytest.fail("looked here"))
    job = make_job(BASE, lora={"rank": 64}, sweep={"trials": 16})

    def answer(text: str) -> None:
        done = SimpleNamespace(stdout=text)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)

    def fail(*_: Any, **__: Any) -> None:
        raise subprocess.CalledProcessError(1, "python")

    answer('{"free": 17179869184, "total": 17179869184, "bfloat16": true}\n')
    assert trials_that_fit(job, True) == trials_that_fit(job, True, Gpu(16 * GIB, 16 * GIB, True))
    monkeypatch.setattr(subprocess, "run", fail)
    assert trials_that_fit(job, True) == 16


def test_the_look_is_one_line_of_json() -> None:
    """Of a machine without a GPU."""
    done = subprocess.run(
        [sys.executable, "-c", machines._LOOK], capture_output=True, text=True, check=True
    )
    found = describe_gpu()
    assert json.loads(done.stdout) == (found and vars(found))
