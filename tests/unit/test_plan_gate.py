"""The plan before a run: limits of the system, budgets, refusals, and what becomes of the plan."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from orchestrator.config import JobConfig, ModelConfig
from orchestrator.errors import RefusedError
from orchestrator.jobfile import load_job
from orchestrator.plan import describe, limits, plan_job, trials_that_fit
from orchestrator.plan.fit import largest_batch, sharing, trials_at_once
from orchestrator.tracking.report import planned_and_measured
from orchestrator.training import budget
from orchestrator.training.budget import Budget
from orchestrator.training.collective import World
from tests import tiny
from tests.unit.test_plan import GIB, make_job

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[2] / "jobs/examples"


class Events(list[tuple[str, dict[str, Any]]]):
    """An observer that keeps what it hears."""

    def emit(self, event: str, **fields: Any) -> None:
        self.append((event, fields))

    def sync(self) -> None:
        return

    def stop_requested(self) -> bool:
        return False

    def save_requested(self) -> bool:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("llama"))


def decide(job: JobConfig, lengths: list[int], base: str | None = None) -> tuple[Budget, Events]:
    events = Events()
    model = ModelConfig(base=base or job.model.base)
    return budget.decide(job, model, np.array(lengths), CPU, World(), 1, events), events


def _write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def test_a_control_group_of_version_2_limits_and_so_do_those_around_it(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user/job"
    _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user/job",
            f"{group}/memory.max": "max",
            f"{group}/memory.current": 10 * GIB,
            f"{group}/memory.stat": "anon 1",
            "sys/fs/cgroup/user/memory.max": 16 * GIB,
            "sys/fs/cgroup/user/memory.current": 12 * GIB,
            "sys/fs/cgroup/user/memory.stat": f"anon 5\ninactive_file {2 * GIB}",
        },
    )
    assert list(limits._cgroups(tmp_path)) == [6 * GIB]


def test_a_control_group_of_version_1_limits_inside_a_container(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"
    _write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/",
            f"{group}/memory.limit_in_bytes": 4 * GIB,
            f"{group}/memory.usage_in_bytes": 3 * GIB,
            f"{group}/memory.stat": f"total_inactive_file {GIB}",
        },
    )
    assert list(limits._cgroups(tmp_path)) == [2 * GIB]


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert list(limits._cgroups(tmp_path)) == []


def test_a_limit_on_the_address_space_is_seen() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + 300 * 2**20
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        free = limits.free_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert 200 * 2**20 < free <= 300 * 2**20
    assert limits.free_bytes(2) == pytest.approx(limits.free_bytes() / 2, rel=0.2)


def test_auto_is_what_the_plan_says(folder: Path) -> None:
    job = make_job(str(folder))
    found, events = decide(job, [40, 60, 30])
    ((name, plan),) = events
    assert name == "plan" and plan["fits"]
    assert found == Budget(plan["tokens_per_pass"], plan["gradient_checkpointing"])
    json.dumps(plan)
    fixed = make_job(str(folder), training={"tokens_per_pass": 300, "gradient_checkpointing": True})
    assert decide(fixed, [40, 60, 30])[0] == Budget(300, True)


def test_rows_are_no_longer_than_a_step(folder: Path) -> None:
    """A large budget costs nothing where a step has few tokens."""
    training = {"tokens_per_pass": 65536, "batch_size": 2}
    job = make_job(str(folder), training=training)
    _, ((_, small),) = decide(job, [40, 60, 30])
    _, ((_, large),) = decide(
        make_job(str(folder), training={**training, "batch_size": 512}), [60] * 2000
    )
    parts = [plan["per_gpu_bytes"]["activations"] for plan in (small, large)]
    assert 20 * parts[0] < parts[1]


def test_what_cannot_fit_is_refused_with_its_numbers(folder: Path) -> None:
    job = make_job(str(folder), lora={"rank": 50_000_000})
    with pytest.raises(RefusedError, match=r"takes .* GiB of the .* GiB.*--set lora.rank="):
        decide(job, [40])
    with pytest.raises(RefusedError, match="does not fit"):
        budget.check_before_download(make_job("meta-llama/Llama-3.1-405B"), CPU, World(), 1)
    budget.check_before_download(make_job("HuggingFaceTB/SmolLM2-135M"), CPU, World(), 1)


def test_a_model_that_cannot_be_planned_trains_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    job = make_job(str(tmp_path))
    found, events = decide(job, [40])
    assert found == Budget(256, True)
    ((name, fields),) = events
    assert name == "warning" and "without a plan" in fields["message"]
    budget.check_before_download(job, CPU, World(), 1)
    assert trials_that_fit(job, False) == trials_at_once(job, False) == 1


def test_workers_that_share_a_gpu_share_its_memory() -> None:
    job = make_job("HuggingFaceTB/SmolLM2-135M", cluster={"gpus_per_worker": 0.5})
    assert sharing(job) == 2
    assert plan_job(job, 8 * GIB).gpu_bytes == 4 * GIB


def test_a_sweep_is_planned_for_its_trials() -> None:
    sweep = {
        "trials": 12,
        "search_space": {"training.batch_size": {"choice": [4, 64]}},
        "concurrent": 6,
    }
    job = make_job("HuggingFaceTB/SmolLM2-135M", sweep=sweep)
    assert (trials_at_once(job, True), largest_batch(job)) == (6, 64)
    assert plan_job(job, 8 * GIB, 1).details["trials"] == 6
    small = plan_job(make_job("meta-llama/Llama-3.1-8B", lora={"rank": 64}, sweep=sweep), 16 * GIB)
    assert not small.fits and any(a.startswith("sweep.concurrent=") for a in small.advice)
    fitting = {"trials": 12, "concurrent": "auto"}
    auto = plan_job(make_job("meta-llama/Llama-3.1-8B", lora={"rank": 64}, sweep=fitting), 16 * GIB)
    assert auto.fits and auto.details["trials"] == auto.concurrent_trials < 12


@pytest.mark.parametrize(("memory", "fits"), [(80, True), (48, False)])
def test_the_example_of_70b_is_planned(memory: int, fits: bool) -> None:
    plan = plan_job(load_job(EXAMPLES / "llama-70b.yaml"), memory * GIB)
    assert plan.fits == fits and plan.details["gpus"] == 8
    assert 35 * GIB < plan.per_gpu_bytes["base"] < 40 * GIB
    assert bool(plan.advice) != fits


def test_a_plan_that_does_not_fit_is_put_well() -> None:
    text = describe(plan_job(make_job("meta-llama/Llama-3.1-405B"), 80 * GIB, 1))
    assert "does not fit" in text and "smaller model" in text
    assert "room for" not in text and "0 " not in text.splitlines()[-3]
    assert "room for" in describe(plan_job(make_job("meta-llama/Llama-3.1-8B"), 24 * GIB, 1))


def test_the_plan_stands_beside_what_was_measured() -> None:
    plan = {"event": "plan", "time": 1.0, "fits": True, "gpu_bytes": 8}
    end = {"event": "finish", "peak_memory_bytes": 7, "tokens_per_second": 2.5, "steps": 1}
    assert planned_and_measured([]) is None
    before = planned_and_measured([plan, {"event": "finish", "status": "failed"}])
    assert before == {"planned": {"fits": True, "gpu_bytes": 8}, "measured": {}}
    after = planned_and_measured([plan, end])
    assert after is not None
    assert after["measured"] == {"peak_memory_bytes": 7, "tokens_per_second": 2.5}
