"""Conversations become texts with the spans that the assistant wrote.

The model's own chat template decides the text. A model without one gets the plain template:

    ### System:
    {content}

    ### User:
    {content}

    ### Assistant:
    {content}{end-of-sequence token}

with an empty line between turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.data.formats import BadRowError, Chat, Text, Turn

_HEADINGS = {
    "system": "### System:\n",
    "user": "### User:\n",
    "tool": "### Tool:\n",
    "assistant": "### Assistant:\n",
}


@dataclass(frozen=True)
class Rendered:
    """A text, and the spans (start, stop) in it that the assistant wrote, ends of turn included.

    special: the text holds its own special tokens, so the tokenizer adds none.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    special: bool


def template_kind(tokenizer: Any) -> str:
    """`model` where the tokenizer brings a chat template, else `plain`."""
    return "model" if tokenizer.chat_template else "plain"


def render(row: Chat | Text, tokenizer: Any) -> Rendered:
    """Render a row.

    Raises:
        BadRowError: the chat template refuses the conversation or changes an answer in it.
    """
    end = tokenizer.eos_token or ""
    if isinstance(row, Text):
        return Rendered(row.text + end, ((0, len(row.text) + len(end)),), False)
    if tokenizer.chat_template:
        return _with_template(row.turns, tokenizer)
    return _plain(row.turns, end)


def _plain(turns: Sequence[Turn], end: str) -> Rendered:
    text, spans = "", []
    for turn in turns:
        text += ("\n\n" if text else "") + _HEADINGS[turn.role]
        start = len(text)
        text += turn.content
        if turn.role == "assistant":
            text += end
            spans.append((start, len(text)))
    return Rendered(text, tuple(spans), False)


def _with_template(turns: Sequence[Turn], tokenizer: Any) -> Rendered:
    full = _apply(turns, tokenizer, False)
    spans: list[tuple[int, int]] = []
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            spans.append(_span(full, turns[: index + 1], spans, tokenizer))
    return Rendered(full, tuple(spans), True)


def _span(
    full: str, turns: Sequence[Turn], before: Sequence[tuple[int, int]], tokenizer: Any
) -> tuple[int, int]:
    """Where the last of `turns` stands in the whole text, its end-of-turn marker included.

    The marker is what the template writes after the answer when the answer comes last.
    """
    content = turns[-1].content.strip()
    prompt = _apply(turns[:-1], tokenizer, True)
    after = before[-1][1] if before else 0
    start = len(prompt) if full.startswith(prompt) else None
    found = full.find(content, after if start is None else start)
    if found < 0:
        raise BadRowError("the chat template leaves an assistant turn out or changes its text")
    alone = _apply(turns, tokenizer, False)
    marker = alone[alone.rfind(content) + len(content) :].rstrip()
    stop = found + len(content)
    if full.startswith(marker, stop):
        stop += len(marker)
    return (found if start is None else start), stop


def _apply(turns: Sequence[Turn], tokenizer: Any, generation: bool) -> str:
    from jinja2 import TemplateError

    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation
        )
    except TemplateError as error:
        folded = _fold_system(turns)
        if folded == list(turns):
            raise BadRowError(f"the model's chat template refuses it: {error}") from error
        return _apply(folded, tokenizer, generation)
    return text


def _fold_system(turns: Sequence[Turn]) -> list[Turn]:
    """Templates without a system role take its text at the head of the first user turn."""
    if len(turns) < 2 or turns[0].role != "system" or turns[1].role != "user":
        return list(turns)
    first = Turn("user", f"{turns[0].content}\n\n{turns[1].content}")
    return [first, *turns[2:]]
