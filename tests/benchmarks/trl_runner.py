"""TRL's SFTTrainer on a QLoRA fine-tune, as a process of its own.

    python -m tests.benchmarks.trl_runner MODEL ROWS SETTING STEPS BATCH RANK

MODEL is a folder in bf16, ROWS a jsonl file with question and answer in the order of training.
Prints one JSON line: setting, losses, tokens_per_second over all but the first steps, peak_bytes.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from orchestrator.training import memory

# Steps that are not counted: caches fill, and our MLflow store is made meanwhile.
WARM_UP = 4
# As our trials have it, whatever their rank.
ALPHA = 32
# What can make TRL faster on this kind of machine, in combinations that its own checks allow.
# Liger kernels need Triton, and flash attention CUDA: neither is there on a CPU.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_checkpointing": {"gradient_checkpointing": False},
    "padding_free": {
        "gradient_checkpointing": False,
        "padding_free": True,
        "max_length": None,
    },
    # One example a pass pads nothing either.
    "accumulate": {"gradient_checkpointing": False},
    "packing": {"gradient_checkpointing": False, "packing": True, "packing_strategy": "bfd"},
    "packing_checkpointing": {"packing": True, "packing_strategy": "bfd"},
    # Processors without fast bfloat16 are faster so; all but this compute in bfloat16.
    "float32": {"gradient_checkpointing": False, "bf16": False},
}


class Clock(TrainerCallback):
    """Notes the seconds and the loss of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def make_trainer(
    model: str,
    rows: list[dict[str, Any]],
    setting: str,
    batch: int,
    rank: int,
    callback: TrainerCallback,
    **options: Any,
) -> Any:
    """An SFTTrainer as TRL's own examples set it up for QLoRA; `options` are SFTConfig's."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    dtype = torch.float32 if setting == "float32" else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    packed, accumulated = "packing" in SETTINGS[setting], setting == "accumulate"
    held_out = options.pop("eval_rows", None)
    config = SFTConfig(
        **{
            "output_dir": "/tmp/unused-trl",
            "use_cpu": True,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.3,
            "completion_only_loss": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "train_sampling_strategy": "sequential",
            # A packed row holds what a padded batch holds.
            "per_device_train_batch_size": 1 if packed or accumulated else batch,
            "per_device_eval_batch_size": batch,
            "gradient_accumulation_steps": batch if accumulated else 1,
            "max_length": 1024,
            **SETTINGS[setting],
            **options,
        }
    )
    return SFTTrainer(
        model=base,
        args=config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if held_out is None else Dataset.from_list(held_out),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear"),
        callbacks=[callback],
    )


def main(model: str, rows: str, setting: str, steps: int, batch: int, rank: int) -> None:
    """Train and print the line."""
    device = torch.device("cpu")
    clock, tokens = Clock(), []
    trainer = make_trainer(
        model, conversations(Path(rows)), setting, batch, rank, clock, max_steps=steps
    )
    step = trainer.training_step

    def counted(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        mask = inputs.get("attention_mask")
        tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        return step(model, inputs, *rest)

    trainer.training_step = counted
    memory.reset_peak(device)
    trainer.train()
    passes = len(tokens) // len(clock.seconds)
    result = {
        "setting": setting,
        "tokens_per_second": sum(tokens[WARM_UP * passes :]) / sum(clock.seconds[WARM_UP:]),
        "peak_bytes": memory.peak_bytes(device),
        "losses": clock.losses,
        "checkpointing": trainer.args.gradient_checkpointing,
    }
    print(json.dumps(result))


def conversations(rows: Path) -> list[dict[str, Any]]:
    """Rows of question and answer as TRL's prompts and completions."""
    made = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        made.append(
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
        )
    return made


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:7]))
