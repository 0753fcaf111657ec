"""The plan for CUDA against what torch's allocator hands out; for `make test-gpu`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.config import QuantizationConfig
from orchestrator.jobfile import job_from_mapping
from orchestrator.model.adapters import AdapterSet
from orchestrator.model.base import from_pretrained, wrap
from orchestrator.model.store import bnb_config
from orchestrator.plan import plan_job
from orchestrator.training import budget, memory
from orchestrator.training.collective import World
from orchestrator.training.engine import Engine
from orchestrator.training.rows import Segment
from orchestrator.training.tenant import Tenant
from tests import tiny

pytestmark = pytest.mark.gpu

WIDE = {
    **tiny.COMMON,
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    return tiny.save_model(tmp_path_factory.mktemp("wide"), LlamaConfig(**WIDE))


@pytest.mark.parametrize("tenants", [1, 4])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("rank", "tokens"), [(16, 2048), (64, 4096)])
def test_the_plan_is_right_within_a_tenth(
    folder: Path, rank: int, tokens: int, checkpointing: bool, tenants: int
) -> None:
    length, device = 512, torch.device("cuda", 0)
    training = {
        "tokens_per_pass": tokens,
        "gradient_checkpointing": checkpointing,
        # A paged optimizer's state lies in managed memory, which torch does not count.
        "optimizer": "adamw",
    }
    job = job_from_mapping(
        {
            "name": "memory",
            "model": {"base": str(folder)},
            "quantization": {"compute_dtype": "bfloat16"},
            "lora": {"rank": rank},
            "data": {"train": "none.jsonl", "max_length": length},
            "training": training,
        }
    )
    parts = plan_job(job, trials=tenants, calibrate=False).per_gpu_bytes
    settings = bnb_config(QuantizationConfig(), torch.bfloat16)
    base = wrap(from_pretrained(folder, device, torch.bfloat16, settings), "test")
    torch.cuda.empty_cache()
    memory.reset_peak(device)
    adapters = AdapterSet(base.model)
    trained = [Tenant(adapters.add(job.lora, n), job.training, 2) for n in range(tenants)]
    budget.apply(budget.Budget(tokens, checkpointing), base.model)
    engine = Engine(base, adapters, World(), tokens)
    each = tokens // length // tenants
    for step in range(2):
        batches = [
            [
                Segment(place, n, replace(example, trained=example.ids >= 0))
                for n, example in enumerate(tiny.examples([length] * each, step))
            ]
            for place in range(tenants)
        ]
        engine.step(trained, batches, [step + 1] * len(batches))
    predicted = parts["total"] - parts["overhead"]
    assert predicted == pytest.approx(memory.peak_bytes(device), rel=0.1)
