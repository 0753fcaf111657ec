"""The plan's arithmetic: shapes, parts, heap, advice; and that its stand-ins mirror the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks

from orchestrator import processor
from orchestrator.config import JobConfig, LoraConfig
from orchestrator.errors import ModelError, RefusedError
from orchestrator.jobfile import job_from_mapping
from orchestrator.model.adapters import AdapterSet
from orchestrator.model.base import wrap
from orchestrator.model.packed import hidden_states
from orchestrator.plan import describe, parse_bytes, plan_job
from orchestrator.plan import passes as plan_passes
from orchestrator.plan.heap import MAPPED_BYTES, Heap
from orchestrator.plan.known import PARAMETERS
from orchestrator.plan.parts import adapter_parameters, base_bytes
from orchestrator.plan.passes import Pass, pass_bytes
from orchestrator.plan.shapes import Shape, build, measure, read_shape
from tests import tiny
from tests.unit.test_architectures import CONFIGS, make_config

GIB = 2**30


def make_job(base: str, **sections: Any) -> JobConfig:
    job = {"name": "plan", "model": {"base": base}, "data": {"train": "none.jsonl"}, **sections}
    return job_from_mapping(job)


def tiny_shape(name: str) -> Shape:
    return measure(build(make_config(name), "float32"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_shapes_have_the_published_number_of_parameters(name: str) -> None:
    assert read_shape(make_job(name).model).parameters == PARAMETERS[name]


@pytest.mark.parametrize(
    ("text", "count"), [("48GiB", 48 * GIB), ("80 GB", 80 * 10**9), ("1024", 1024)]
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["much", "", "-1GiB", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RefusedError, match="48GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_quantized_base_takes_what_is_planned(tmp_path: Path, double_quant: bool) -> None:
    from orchestrator.config import QuantizationConfig
    from orchestrator.model.base import from_pretrained
    from orchestrator.model.store import bnb_config

    folder = tiny.save_model(tmp_path / "model")
    settings = bnb_config(QuantizationConfig(double_quant=double_quant), torch.float32)
    model = from_pretrained(folder, torch.device("cpu"), torch.float32, settings)
    held = 0
    for parameter in model.parameters():
        held += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tables = [] if part is None else [part.absmax, part.code, part.offset]
            held += sum(t.numel() * t.element_size() for t in tables if t is not None)
    shape = read_shape(make_job(str(folder)).model)
    planned = base_bytes(shape, True, double_quant, "float32").total
    buffers = sum(buffer.numel() for buffer in model.buffers())
    # The plan counts buffers as if they were weights.
    assert abs(planned - 4 * buffers - held) <= 16


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [(40, 24), (17,)])
def test_the_engine_keeps_what_is_planned(name: str, lengths: tuple[int, ...]) -> None:
    check_kept(name, lengths, "float32", "float32")


@pytest.mark.parametrize("products", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_bfloat16_engine_keeps_what_is_planned(
    name: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "slow_bfloat16", lambda: products == "float32")
    check_kept(name, (40, 24), "bfloat16", products)


def check_kept(name: str, lengths: tuple[int, ...], dtype: str, products: str) -> None:
    """Storages that autograd holds after a real forward pass, against the stand-ins' ledger."""
    config = make_config(name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    base = wrap(model.train(), "test")
    adapters = AdapterSet(base.model)
    adapter = adapters.add(LoraConfig(rank=4), 0)
    there = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    there |= {b.untyped_storage().data_ptr() for b in base.model.buffers()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), adapters.active([(adapter, 0, -1)]):
        hidden = hidden_states(base, torch.zeros(sum(lengths), dtype=torch.long), lengths)
    shape = tiny_shape(name)
    changes = {"quantized": False, "dtype": dtype, "products": products}
    planned = pass_bytes(shape, make_pass(shape, lengths, **changes))
    # Beside what autograd keeps the row itself lives: ids, and the last layer's output.
    assert sum(kept.values()) <= planned.kept * 1.01
    assert planned.kept - sum(kept.values()) <= 0.15 * planned.kept + 4096
    del hidden


def make_pass(shape: Shape, lengths: tuple[int, ...], **changes: Any) -> Pass:
    values: dict[str, Any] = {
        "lengths": lengths,
        "checkpointing": False,
        "rank": 4,
        "tenants": 1,
        "dropout": 0.0,
        "targets": frozenset(layer.name for layer in shape.linears),
        "quantized": True,
        "double_quant": True,
        "dtype": "float32",
        "cuda": False,
        "varlen": changes.get("cuda", False),
        "products": "float32",
    }
    return Pass(**{**values, **changes})


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("base", ["HuggingFaceTB/SmolLM2-135M", "google/gemma-2-2b"])
def test_a_deep_model_follows_from_two_shallow_ones(
    base: str, checkpointing: bool, cuda: bool
) -> None:
    shape = read_shape(make_job(base).model)
    planned = make_pass(shape, (128,) * 4, checkpointing=checkpointing, cuda=cuda)
    whole = plan_passes._run(shape, planned, shape.layers)
    short = pass_bytes(shape, planned)
    assert (short.peak, short.kept) == (whole.peak, whole.kept)
    # The heap's holes grow evenly only nearly.
    assert abs(short.holes - whole.holes) <= 0.05 * whole.peak


def test_checkpointing_tokens_and_rank_change_memory_the_right_way() -> None:
    shape = read_shape(make_job("meta-llama/Llama-3.2-1B").model)
    plain = pass_bytes(shape, make_pass(shape, (256, 256)))
    assert pass_bytes(shape, make_pass(shape, (256, 256), checkpointing=True)).peak < plain.peak
    assert pass_bytes(shape, make_pass(shape, (256,) * 4)).peak > plain.peak
    assert pass_bytes(shape, make_pass(shape, (256, 256), rank=64)).peak > plain.peak


def test_rows_of_evaluation_compile_no_backward_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_passes, "heap_bytes", lambda *given: 0)
    shape = tiny_shape("Llama")
    # A rank of its own: what is planned here is remembered.
    changes = {"products": "bfloat16", "dtype": "bfloat16", "rank": 5}
    two, more = (
        pass_bytes(shape, make_pass(shape, (128,), longest_row=most, **changes))
        for most in (0, 1024)
    )
    # Rows of 64 and 128 tokens are trained, fourteen longer ones evaluated.
    trained, evaluated = (two.holes + two.peak) / 2, (more.holes - two.holes) / 14
    assert 0.2 * trained < evaluated < 0.6 * trained


def test_a_freed_block_serves_no_block_of_its_size() -> None:
    heap = Heap()
    heap.take("a", 1000)
    heap.take("wall", 1000)
    heap.free("a")
    before = heap.top
    heap.take("b", 1000)
    assert heap.top > before
    heap.take("c", 800)
    assert heap.peak == heap.top


def test_neighbours_freed_together_are_one_hole() -> None:
    heap = Heap()
    for name in ("a", "b", "wall"):
        heap.take(name, 1000)
    before = heap.top
    heap.free("a")
    heap.free("b")
    heap.take("c", 1500)
    assert heap.top == before


def test_a_mapped_block_is_gone_when_freed() -> None:
    heap = Heap()
    heap.take("large", MAPPED_BYTES)
    heap.free("large")
    heap.take("large", MAPPED_BYTES)
    assert (heap.top, heap.peak) == (0, heap.mapped)


def test_json_is_the_contract() -> None:
    plan = plan_job(make_job("meta-llama/Llama-3.1-8B"), 24 * GIB, 1)
    content = json.loads(json.dumps(plan.to_json()))
    parts = content["per_gpu_bytes"]
    assert list(parts) == [
        *["base", "adapters", "gradients", "optimizer"],
        *["activations", "logits", "overhead", "total"],
    ]
    assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
    for key in ("fits", "gpu_bytes", "concurrent_trials", "tokens_per_pass", "disk_bytes"):
        assert key in content
    assert content["fits"] and content["advice"] == []
    assert "fits" in describe(plan)


@pytest.mark.parametrize(
    ("base", "memory", "sections"),
    [
        (
            "meta-llama/Llama-3.1-8B",
            10 * GIB,
            {"training": {"gradient_checkpointing": False, "tokens_per_pass": 4096}},
        ),
        ("meta-llama/Llama-3.1-8B", 12 * GIB, {"quantization": {"type": "none"}}),
        ("huggyllama/llama-65b", 48 * GIB, {"lora": {"rank": 256}}),
    ],
)
def test_advice_makes_the_job_fit(base: str, memory: int, sections: dict[str, Any]) -> None:
    plan = plan_job(make_job(base, **sections), memory, 1)
    assert not plan.fits
    assert plan.advice
    changed = {section: dict(values) for section, values in sections.items()}
    for change in plan.advice:
        key, _, value = change.partition("=")
        section, name = key.split(".")
        changed.setdefault(section, {})[name] = (
            json.loads(value) if value[0] in "0123456789tf" else value
        )
    assert plan_job(make_job(base, **changed), memory, 1).fits


def test_what_never_fits_gets_no_advice() -> None:
    plan = plan_job(make_job("meta-llama/Llama-3.1-405B"), 80 * GIB, 1)
    assert (plan.fits, plan.advice, plan.concurrent_trials) == (False, (), 0)
    assert "smaller model" in describe(plan)


def test_a_sweep_is_planned_for_its_largest_rank() -> None:
    sweep = {"search_space": {"lora.rank": {"choice": [8, 64]}}}
    job = make_job("HuggingFaceTB/SmolLM2-135M", sweep=sweep)
    plan = plan_job(job, 8 * GIB, 1, trials=4)
    shape = read_shape(job.model)
    assert plan.details["trainable_parameters"] == adapter_parameters(shape.linears, 64)
    assert plan.per_gpu_bytes["gradients"] == 4 * 4 * adapter_parameters(shape.linears, 64)
    assert plan.concurrent_trials > 4


def test_the_sum_over_workers_needs_a_copy_of_the_gradients() -> None:
    job = make_job("HuggingFaceTB/SmolLM2-135M")
    assert plan_job(job, 8 * GIB, 1).details["collective_bytes"] == 0
    plan = plan_job(job, 8 * GIB, 8)
    assert plan.details["collective_bytes"] == plan.per_gpu_bytes["gradients"]


def test_trials_that_workers_train_apart_are_never_summed() -> None:
    job = make_job("HuggingFaceTB/SmolLM2-135M", sweep={"trials": 32})
    plan = plan_job(job, 8 * GIB, 8)
    assert (plan.details["trials"], plan.details["collective_bytes"]) == (2, 0)
    few = make_job("HuggingFaceTB/SmolLM2-135M", sweep={"trials": 32, "concurrent": 3})
    plan = plan_job(few, 8 * GIB, 8)
    assert plan.details["trials"] == 3
    assert plan.details["collective_bytes"] == plan.per_gpu_bytes["gradients"] > 0


def test_an_unknown_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RefusedError, match=r"model.base: .*no/such-model.*local folder"):
        plan_job(make_job("no/such-model"), GIB)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ModelError, match="does not exist"):
        plan_job(make_job("./nowhere"), GIB)
    with pytest.raises(ModelError, match="no layer 'nose'; it has"):
        plan_job(make_job("HuggingFaceTB/SmolLM2-135M", lora={"target_modules": ["nose"]}), GIB)
    with pytest.raises(RefusedError, match="float16 needs a GPU"):
        cpu = make_job("HuggingFaceTB/SmolLM2-135M", quantization={"compute_dtype": "float16"})
        plan_job(cpu, calibrate=False)


def test_a_folder_is_planned_on_this_machine(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model")
    plan = plan_job(make_job(str(folder), data={"train": "x", "max_length": 64}))
    assert plan.fits and plan.details["device"] == "cpu"
    assert plan.details["tokens_per_second"] > 0
