"""Conversations become texts with the spans that the assistant wrote.

The model's own chat template decides the text. A model without one gets the plain template:

    ### System:
    {content}

    ### User:
    {content}

    ### Assistant:
    {content}{end-of-sequence token}

with an empty line between turns. In it a content cannot pass for the template: a line that starts
like a heading gets a space before it, a special token's text one after its first character. A
prompt and completion that are plain texts are joined as they are, the end-of-sequence token after.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from orchestrator.data.formats import BadRowError, Chat, Text, Turn
from orchestrator.errors import DataError

_HEADINGS = {
    "system": "### System:\n",
    "user": "### User:\n",
    "tool": "### Tool:\n",
    "assistant": "### Assistant:\n",
}
_HEADING = re.compile(r"^(?=### (?:System|User|Tool|Assistant):)", re.MULTILINE)
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
# Stands in for an answer, so that what a template writes around it can be told from it.
_MARK = "Xq7vAnswerZk2w"
# What templates raise on conversations that they do not expect.
_REFUSALS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


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


def chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's own chat template, if it brings one.

    Raises:
        DataError: it has several, and none is the default.
    """
    try:
        return tokenizer.get_chat_template() if tokenizer.chat_template else None
    except ValueError as error:
        raise DataError(f"model.base: its chat template cannot be chosen: {error}") from error


class Renderer:
    """Renders rows for one tokenizer.

    Raises:
        DataError: the tokenizer has chat templates, and none is the default.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end: str = tokenizer.eos_token or ""
        self._bos: str = tokenizer.bos_token or ""
        self._ends_of_turn: dict[str | None, str] = {}
        # By the roles of a conversation: the first turn that the template leaves out of it.
        self._left_out: dict[tuple[str, ...], int | None] = {}
        self._template = chat_template(tokenizer)

    def render(self, row: Chat | Text) -> Rendered:
        """Render a row.

        Raises:
            BadRowError: the chat template refuses the conversation or leaves an answer out.
        """
        if isinstance(row, Text):
            text = self._ended(row.text)
            return Rendered(text, ((0, len(text)),), self._begins(text))
        if self._template is not None:
            return self._with_template(row)
        return self._joined(row) if row.joined else self._plain(row)

    def _joined(self, chat: Chat) -> Rendered:
        prompt, completion = (turn.content for turn in chat.turns)
        text = prompt + self._ended(completion)
        return Rendered(text, ((len(prompt), len(text)),), self._begins(text))

    def _plain(self, chat: Chat) -> Rendered:
        text, spans = "", []
        for index, turn in enumerate(chat.turns):
            text += ("\n\n" if text else "") + _HEADINGS[turn.role]
            start = len(text)
            text += self._harmless(turn.content)
            if turn.role == "assistant":
                text += self._end
                if turn.trained and index >= chat.trained_from:
                    spans.append((start, len(text)))
        return Rendered(text, tuple(spans), False)

    def _ended(self, text: str) -> str:
        return text if self._end and text.endswith(self._end) else text + self._end

    def _begins(self, text: str) -> bool:
        return bool(self._bos) and text.startswith(self._bos)

    def _harmless(self, content: str) -> str:
        for token in self._special_texts:
            content = content.replace(token, f"{token[0]} {token[1:]}")
        return _HEADING.sub(" ", content)

    @cached_property
    def _special_texts(self) -> list[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special}
        texts |= set(self._tokenizer.all_special_tokens)
        return sorted((text for text in texts if len(text) > 1), key=lambda t: (-len(t), t))

    def _with_template(self, chat: Chat) -> Rendered:
        turns = chat.turns if self._takes_system else _fold_system(chat.turns)
        trained_from = chat.trained_from - (len(chat.turns) - len(turns))
        full = self._apply(turns)
        self._refuse_left_out(turns, len(chat.turns) - len(turns))
        own = self._own_stops(turns, full)
        spans: list[tuple[int, int]] = []
        for index, turn in enumerate(turns):
            if turn.role == "assistant" and turn.trained and index >= trained_from:
                spans.append(self._span(full, turns, index, own.get(index)))
        last = turns[-1]
        if last.role == "assistant" and last.trained and not self._end_of_turn(turns[:-1]):
            # A model that never sees an end never stops.
            start, stop = spans[-1]
            full = full[:stop] + self._end
            spans[-1] = (start, len(full))
        return Rendered(full, tuple(spans), True)

    def _span(
        self, full: str, turns: Sequence[Turn], index: int, own: int | None
    ) -> tuple[int, int]:
        """Where an answer stands in the whole text, its end of turn included.

        It starts where the prompt for it ends. A template may rewrite an answer (reasoning models
        drop the thoughts of earlier turns): then it is what lies between the texts around it.
        """
        end = self._end_of_turn(turns[:index])
        start = self._prompt_length(full, turns[:index])
        if start is not None and own is None:
            content = turns[index].content
            for written in (content, content.strip()):
                if full.startswith(written + end, start):
                    return start, start + len(written) + len(end)
        if start is None or own is None:
            before, after = self._around(turns, index)
            if not full.endswith(after) or (start is None and not full.startswith(before)):
                raise BadRowError(f"the chat template mixes assistant turn {index + 1} with others")
            if start is None or (not self._asks and before[start:].strip()):
                # No prompt of the template's holds the heading, so it is no answer's part either.
                start = len(before) if full.startswith(before) else start
            own = len(full) - len(after)
        if start is None or not full[start:own].strip():
            raise BadRowError(f"the chat template leaves assistant turn {index + 1} out")
        return start, own + len(self._shared_end(end, full[own:]))

    def _shared_end(self, end: str, behind: str) -> str:
        """What of an end of turn stands behind an answer that others follow.

        Some templates write more behind the last answer than behind the others. What both share may
        stop within a special token, which begins as another does: whole ones and lines count.
        """
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(end, behind, strict=False))
        shared = "".join(a for a, _ in pairs)
        if shared == end:
            return end
        stops = [shared.rfind(text) + len(text) for text in self._special_texts if text in shared]
        return shared[: max([0, shared.rfind("\n"), *stops])].rstrip()

    def _prompt_length(self, full: str, turns: Sequence[Turn]) -> int | None:
        """Length of the prompt that the next turn answers, where the whole text begins with it."""
        if not turns:
            return None
        try:
            prompt = self._apply(turns, generation=True)
        except BadRowError:
            return None
        return len(prompt) if full.startswith(prompt) else None

    def _around(self, turns: Sequence[Turn], index: int) -> tuple[str, str]:
        """What the template writes before and after an answer, whatever the answer."""
        marked = [*turns[:index], Turn("assistant", _MARK), *turns[index + 1 :]]
        before, *after = self._apply(marked).split(_MARK)
        if len(after) != 1:
            raise BadRowError(f"the chat template leaves assistant turn {index + 1} out")
        return before, after[0]

    def _end_of_turn(self, before: Sequence[Turn]) -> str:
        """What the template writes after an answer that comes last, without blank space behind."""
        previous = before[-1].role if before else None
        if previous not in self._ends_of_turn:
            _, after = self._around([*before, Turn("assistant", _MARK)], len(before))
            self._ends_of_turn[previous] = after.rstrip()
        return self._ends_of_turn[previous]

    def _own_stops(self, turns: Sequence[Turn], full: str) -> dict[int, int]:
        """Where the template's own `{% generation %}` blocks end, by turn, ends of turn left out.

        Empty where it has none, or not one for each answer.
        """
        if self._template is None or not _GENERATION.search(self._template):
            return {}
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, blocks = render_jinja_template(
            [_messages(turns)],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        if texts[0] != full or len(blocks[0]) != len(answers):
            return {}
        stops = {}
        for index, (start, stop) in zip(answers, blocks[0], strict=True):
            written = full[start:stop].rstrip().removesuffix(self._end_of_turn(turns[:index]))
            stops[index] = start + len(written)
        return stops

    @cached_property
    def _asks(self) -> bool:
        """Whether the template writes the heading of an answer that is to come."""
        probe = [Turn("user", "a")]
        try:
            return self._apply(probe) != self._apply(probe, generation=True)
        except BadRowError:
            return True

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template writes a system turn; some refuse it, some leave it out."""
        probe = [Turn("system", _MARK), Turn("user", "a"), Turn("assistant", "b")]
        try:
            return _MARK in self._apply(probe)
        except BadRowError:
            return False

    def _refuse_left_out(self, turns: Sequence[Turn], folded: int) -> None:
        """Templates know no tools, or system turns at the beginning only, and drop the others."""
        marks = {n: f"{_MARK}{n}." for n, t in enumerate(turns) if t.role in ("system", "tool")}
        if not marks:
            return
        roles = tuple(turn.role for turn in turns)
        if roles not in self._left_out:
            text = self._apply(
                [replace(turn, content=marks.get(n, turn.content)) for n, turn in enumerate(turns)]
            )
            self._left_out[roles] = next((n for n, mark in marks.items() if mark not in text), None)
        index = self._left_out[roles]
        if index is not None:
            raise BadRowError(
                f"the model's chat template leaves {roles[index]} turn {index + 1 + folded} out"
            )

    def _apply(self, turns: Sequence[Turn], generation: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                _messages(turns), tokenize=False, add_generation_prompt=generation
            )
        except (TemplateError, *_REFUSALS) as error:
            raise BadRowError(f"the model's chat template refuses it: {error}") from error
        return text


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _fold_system(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Put a system turn's text at the head of the user turn behind it."""
    if len(turns) < 2 or turns[0].role != "system" or turns[1].role != "user":
        return turns
    return (Turn("user", f"{turns[0].content}\n\n{turns[1].content}"), *turns[2:])
