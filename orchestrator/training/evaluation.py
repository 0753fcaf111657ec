"""Eval loss on the held-out set, and answers to its prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.data import EncodedDataset, Example
from orchestrator.model.adapters import Adapter
from orchestrator.training.engine import Engine
from orchestrator.training.rows import Segment

# Examples whose rows are laid out together; bounds what is in memory at a time.
_CHUNK = 512
NEW_TOKENS = 64
_PROMPT_LIMIT = 512


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, what the data answers, what the model answers."""

    index: int
    prompt: str
    reference: str
    answer: str


def eval_loss(engine: Engine, adapter: Adapter, dataset: EncodedDataset) -> float:
    """Mean loss of the data set's target tokens in nats."""
    total, targets = 0.0, 0
    for start in range(0, len(dataset), _CHUNK):
        stop = min(start + _CHUNK, len(dataset))
        segments = [Segment(0, index, dataset[index]) for index in range(start, stop)]
        part, count = engine.evaluate(adapter, segments)
        total, targets = total + part, targets + count
    return total / max(1, targets)


def samples(
    engine: Engine, adapter: Adapter, dataset: EncodedDataset, count: int, tokenizer: Any
) -> list[Sample]:
    """Greedy answers of at most NEW_TOKENS tokens to the data set's first prompts."""
    examples = _with_different_prompts(dataset, count)
    if not examples:
        return []
    prompts = [
        example.ids[: example.answer_start][-_PROMPT_LIMIT:].tolist() for example in examples
    ]
    answers = _generate(engine, adapter, prompts, tokenizer, examples)
    return [
        Sample(
            index,
            tokenizer.decode(prompt, skip_special_tokens=True),
            tokenizer.decode(example.ids[example.answer_start :], skip_special_tokens=True),
            answer,
        )
        for index, (example, prompt, answer) in enumerate(
            zip(examples, prompts, answers, strict=True)
        )
    ]


def _with_different_prompts(dataset: EncodedDataset, count: int) -> list[Example]:
    """The data set's first examples whose prompts are not alike."""
    found: dict[bytes, Example] = {}
    for index in range(min(len(dataset), 10 * count)):
        example = dataset[index]
        found.setdefault(example.ids[: example.answer_start].tobytes(), example)
        if len(found) == count:
            break
    return list(found.values())


@torch.no_grad()
def _generate(
    engine: Engine,
    adapter: Adapter,
    prompts: Sequence[list[int]],
    tokenizer: Any,
    examples: Sequence[Example],
) -> list[str]:
    from transformers import GenerationConfig

    model, device = engine.base.model, engine.base.device
    width = max(len(prompt) for prompt in prompts)
    ends = sorted(set(_end_tokens(model, tokenizer, examples)))
    padding = ends[0] if ends else 0
    ids = torch.full((len(prompts), width), padding, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends or None, pad_token_id=padding
    )
    with engine.adapters.active([(adapter, 0, -1)]), engine.base.unpacked():
        output = model.generate(ids, attention_mask=mask, generation_config=config)
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def _end_tokens(model: Any, tokenizer: Any, examples: Sequence[Example]) -> Iterator[int]:
    """Tokens that end an answer: the model's, the tokenizer's, those the data ends turns with."""
    own = getattr(model.generation_config, "eos_token_id", None)
    if own is not None:
        yield from own if isinstance(own, (list, tuple)) else [own]
    if tokenizer.eos_token_id is not None:
        yield tokenizer.eos_token_id
    special = set(tokenizer.all_special_ids)
    for example in examples:
        last = int(example.ids[example.trained][-1]) if example.trained.any() else -1
        if last in special:
            yield last
