"""Rows of known formats become conversations or plain texts."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import DataError


class BadRowError(ValueError):
    """A row does not fit its format; the message says why."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `role` is system, user, assistant or tool.

    trained: False where the data gives an answer the weight 0.
    """

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one assistant turn to train on.

    trained_from: assistant turns before this place are given, as examples in a prompt are.
    joined: a prompt and its completion, which without a chat template are simply joined.
    """

    turns: tuple[Turn, ...]
    trained_from: int = 0
    joined: bool = False


@dataclass(frozen=True)
class Text:
    """A plain text."""

    text: str


_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
}
# An answer without the call that followed it would teach the model to stop there.
_CALLS = ("tool_calls", "function_call")
_UNTRAINED = "this version does not train; leave such rows out with data.on_bad_row: skip"


@dataclass(frozen=True)
class Format:
    """A data format: the columns it needs, those it may have, and how a row is read."""

    name: str
    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Chat | Text]
    optional: tuple[str, ...] = ()


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise BadRowError(f"column {column} is missing")
    if not isinstance(value, str):
        raise BadRowError(f"column {column} holds {type(value).__name__}, not text")
    if not value.strip():
        raise BadRowError(f"column {column} is empty")
    return _unicode(value, f"column {column}")


def _unicode(value: str, where: str) -> str:
    # Escapes in JSON, and undecodable bytes in CSV, make texts that no tokenizer takes.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"{where} is not UTF-8 text (at character {error.start})") from None
    return value


def _turns(messages: Any, column: str, role_key: str, content_key: str) -> list[Turn]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadRowError(f"column {column} is no list of messages")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise BadRowError(f"message {number} of {column} is no object")
        role, content = message.get(role_key), message.get(content_key)
        if not isinstance(role, str) or role not in _ROLES:
            known = ", ".join(sorted(_ROLES))
            raise BadRowError(f"message {number} has {role_key} {role!r}; known are {known}")
        if not isinstance(content, str):
            raise BadRowError(f"message {number} has no text in {content_key!r}")
        for key in _CALLS:
            if not _absent(message.get(key)):
                raise BadRowError(f"message {number} has {key}, which {_UNTRAINED}")
        weight = message.get("weight") if _ROLES[role] == "assistant" else None
        if not _absent(weight) and weight not in (0, 1):
            raise BadRowError(f"message {number} has the weight {weight!r}; it is 0 or 1")
        text = _unicode(content, f"message {number} of {column}")
        turns.append(Turn(_ROLES[role], text, weight != 0))
    return turns


def _absent(value: Any) -> bool:
    """Whether a value is none: tables fill every row, some with empty JSON as text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        return all(map(_absent, value.values()))
    # NaN is what tables write for a number that is not there.
    return value is None or value != value or (isinstance(value, (list, tuple)) and not value)


def _without_tools(row: Mapping[str, Any]) -> None:
    if not _absent(row.get("tools")):
        raise BadRowError(f"column tools describes tools, which {_UNTRAINED}")


def _system(row: Mapping[str, Any]) -> list[Turn]:
    """The system turn that a column of its own holds, if one does."""
    return [] if _absent(row.get("system")) else [Turn("system", _text(row, "system"))]


def _chat(turns: Iterable[Turn], trained_from: int = 0, joined: bool = False) -> Chat:
    kept = tuple(turns)
    answers = [turn for turn in kept[trained_from:] if turn.role == "assistant" and turn.trained]
    if not answers:
        raise BadRowError("it has no assistant turn to train on")
    if any(not turn.content.strip() for turn in answers):
        raise BadRowError("an assistant turn is empty")
    return Chat(kept, trained_from, joined)


def _messages(row: Mapping[str, Any]) -> Chat:
    _without_tools(row)
    return _chat(_turns(row.get("messages"), "messages", "role", "content"))


def _sharegpt(row: Mapping[str, Any]) -> Chat:
    _without_tools(row)
    turns = _turns(row.get("conversations"), "conversations", "from", "value")
    return _chat([*_system(row), *turns])


def _prompt_completion(row: Mapping[str, Any]) -> Chat:
    _without_tools(row)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        question, answer = _text(row, "prompt"), _text(row, "completion")
        return _chat([Turn("user", question), Turn("assistant", answer)], joined=True)
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
        before = _turns(prompt, "prompt", "role", "content")
        after = _turns(completion, "completion", "role", "content")
        return _chat([*before, *after], trained_from=len(before))
    raise BadRowError("prompt and completion are both texts, or both lists of messages")


def _alpaca(row: Mapping[str, Any]) -> Chat:
    question = _text(row, "instruction")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRowError(f"column input holds {type(extra).__name__}, not text")
    if extra and extra.strip():
        question = f"{question}\n\n{_unicode(extra, 'column input')}"
    asked = [Turn("user", question), Turn("assistant", _text(row, "output"))]
    return _chat([*_system(row), *_history(row), *asked])


def _history(row: Mapping[str, Any]) -> list[Turn]:
    """Earlier questions and answers, as a list of pairs; in CSV as JSON. An empty one is none."""
    history = row.get("history")
    if _absent(history):
        return []
    if isinstance(history, str):
        try:
            history = json.loads(history)
        except ValueError:
            history = None
    if not isinstance(history, (list, tuple)) or not all(map(_is_pair, history)):
        raise BadRowError("column history is no list of pairs of question and answer")
    turns = []
    for pair in history:
        question, answer = (_unicode(text, "column history") for text in pair)
        turns += [Turn("user", question), Turn("assistant", answer, bool(answer.strip()))]
    return turns


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and [type(text) for text in value] == [str, str]


def _question_answer(row: Mapping[str, Any]) -> Chat:
    return _chat([Turn("user", _text(row, "question")), Turn("assistant", _text(row, "answer"))])


def _plain(row: Mapping[str, Any]) -> Text:
    return Text(_text(row, "text"))


FORMATS = {
    format.name: format
    for format in (
        Format("messages", ("messages",), _messages, ("tools",)),
        Format("sharegpt", ("conversations",), _sharegpt, ("system", "tools")),
        Format("prompt_completion", ("prompt", "completion"), _prompt_completion, ("tools",)),
        Format("alpaca", ("instruction", "output"), _alpaca, ("input", "system", "history")),
        Format("question_answer", ("question", "answer"), _question_answer),
        Format("text", ("text",), _plain),
    )
}


def check_columns(name: str, columns: Mapping[str, str]) -> None:
    """Refuse a mapping of columns that the format does not have.

    Raises:
        DataError: `data.columns` names an unknown column.
    """
    formats = FORMATS.values() if name == "auto" else [FORMATS[name]]
    known = sorted({c for f in formats for c in (*f.required, *f.optional)})
    for column in columns:
        if column not in known:
            raise DataError(
                f"data.columns: the format {name} has no column {column!r}; it has "
                f"{', '.join(known)}"
            )


def detect(rows: Sequence[Collection[str]], columns: Mapping[str, str], source: str) -> Format:
    """The format that fits most rows by their columns, of equals the most telling.

    Raises:
        DataError: no format fits.
    """
    there = {column for row in rows for column in row}
    if not there:
        raise DataError(f"{source} is empty: it has no rows and no columns")

    def fitting(format: Format) -> int:
        names = {columns.get(column, column) for column in format.required}
        return sum(names <= set(row) for row in rows)

    # The first of the largest: the formats stand in that order.
    best = max(FORMATS.values(), key=fitting)
    if fitting(best):
        return best
    shapes = "; ".join(f"{f.name}: {', '.join(f.required)}" for f in FORMATS.values())
    raise DataError(
        f"{source} has the columns {', '.join(sorted(there))}, which fit no format ({shapes}). "
        "Set data.format, and data.columns where the names differ"
    )


def rename(row: Mapping[str, Any], format: Format, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row's values under the format's own column names.

    Raises:
        BadRowError: a column is missing, named as the data has it.
    """
    for name in format.required:
        if columns.get(name, name) not in row:
            raise BadRowError(f"column {columns.get(name, name)} is missing")
    names = (*format.required, *format.optional)
    return {name: row.get(columns.get(name, name)) for name in names}
