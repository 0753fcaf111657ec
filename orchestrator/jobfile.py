"""Reading a job file: YAML with line numbers, overrides, and errors a person can act on."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from orchestrator.config import JobConfig
from orchestrator.errors import JobFileError

_Path = tuple[str | int, ...]


@dataclass
class _Places:
    """Where each key came from: a line of the file, or an override."""

    file: str
    tree: Any
    overrides: dict[_Path, str] = field(default_factory=dict)

    def find(self, path: _Path) -> tuple[int, str]:
        """A sort key and the words for the place of a key or, failing that, of its section."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.overrides:
                return 10**9, self.overrides[path[:length]]
        line = self._line(path)
        return line, f"{self.file}:{line}" if line else self.file

    def _line(self, path: _Path) -> int:
        node, line = self.tree, 1 if isinstance(self.tree, CommentedMap) else 0
        for part in path:
            if isinstance(node, CommentedMap) and part in node:
                line = node.lc.key(part)[0] + 1 if part in node.lc.data else line
                node = node[part]
            else:
                break
        return line


def load_job(path: Path | str, overrides: Sequence[str] = ()) -> JobConfig:
    """Read and check a job file.

    Relative paths in it stay as written; they mean the folder the command is given in.

    Args:
        path: the YAML file.
        overrides: `key=value` settings, such as `lora.rank=8`, that win over the file.

    Raises:
        JobFileError: the file cannot be read, or a key or value in it is not allowed; every
            fault is named with its line.
    """
    file = Path(path)
    tree = _parse(_text(file), str(file))
    places = _Places(str(file), tree)
    return _validate(_override(_plain(tree), overrides, places), places)


def job_from_mapping(mapping: Mapping[str, Any]) -> JobConfig:
    """Check a job given as a mapping; faults are named with their keys.

    Raises:
        JobFileError: a key or value is not allowed.
    """
    return _validate(_plain(mapping), _Places("job", mapping))


def dump_job(job: JobConfig) -> str:
    """The resolved job as YAML text that `load_job` reads back."""
    stream = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(_plain(job.model_dump(mode="json", exclude_none=False)), stream)
    return stream.getvalue()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        close = get_close_matches(file.name, siblings, n=1)
        hint = f"; did you mean {file.parent / close[0]}?" if close else ""
        raise JobFileError(f"{file} does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobFileError(f"{file} cannot be read: {error}") from error


def _parse(text: str, file: str) -> CommentedMap:
    try:
        tree = YAML().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        problem = (error.problem or error.context or "not valid YAML").splitlines()[0]
        raise JobFileError(f"{place}: {problem}") from None
    except YAMLError as error:
        raise JobFileError(f"{file}: not valid YAML: {error}") from None
    if tree is None:
        raise JobFileError(
            f"{file}: the file is empty; it needs at least name, model.base, data.train"
        )
    if not isinstance(tree, CommentedMap):
        raise JobFileError(f"{file}:1: a job file is a mapping of keys, this is a list or a value")
    return tree


def _plain(value: Any) -> Any:
    """The same content in Python's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _override(content: dict[str, Any], overrides: Sequence[str], places: _Places) -> dict[str, Any]:
    for text in overrides:
        key, equals, value = text.partition("=")
        place = f"--set {_hide(key, text)}"
        if not equals or not key:
            raise JobFileError(f"{place}: give KEY=VALUE, such as lora.rank=8")
        path = tuple(key.split("."))
        try:
            parsed = _plain(YAML(typ="safe", pure=True).load(value))
        except YAMLError as error:
            raise JobFileError(f"{place}: the value is not valid YAML: {error}") from None
        node = content
        for part in path[:-1]:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[path[-1]] = parsed
        places.overrides[path] = place
    return content


def _hide(key: str, text: str) -> str:
    return f"{key}=..." if key == "tracking.uri" else text


def _validate(content: dict[str, Any], places: _Places) -> JobConfig:
    try:
        return JobConfig.model_validate(content)
    except ValidationError as error:
        faults = sorted({(*places.find(path), text) for path, text in _faults(error, content)})
        raise JobFileError("\n".join(f"{place}: {text}" for _, place, text in faults)) from None


def _faults(error: ValidationError, content: dict[str, Any]) -> Iterator[tuple[_Path, str]]:
    """Each fault once: its path and what is wrong, right and allowed."""
    seen: set[_Path] = set()
    for item in error.errors():
        path = _real_path(item["loc"], content)
        key = ".".join(map(str, path))
        kind, message = item["type"], item["msg"]
        if kind == "extra_forbidden":
            yield path, f"{key}: unknown key{_suggest(path)}"
        elif path in seen:
            continue
        elif kind == "missing":
            yield path, f"{key}: missing; {_describe(path)}"
        else:
            seen.add(path)
            yield path, f"{key}: {_wrong(path, kind, message, item)}" if key else _clean(message)


def _wrong(path: _Path, kind: str, message: str, item: Any) -> str:
    value, context = item["input"], item.get("ctx", {})
    shown = "that" if path == ("tracking", "uri") else repr(value)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{shown} is no section; give a mapping of keys"
    if kind == "literal_error":
        allowed = [a.strip("' ") for a in re.split(r", | or ", context["expected"])]
        close = get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{shown} is not allowed{hint or ';'} allowed: {', '.join(allowed)}"
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        return f"{shown} is text; {_clean(message)}, without quotes"
    return f"{shown} is not allowed; {_clean(message)}"


def _clean(message: str) -> str:
    text = message.removeprefix("Value error, ")
    text = text.replace("Input should be", "it must be")
    return text[0].lower() + text[1:] if text else text


def _real_path(location: tuple[Any, ...], content: Any) -> _Path:
    """The path in the job file; pydantic adds the names of a union's branches to it."""
    path: list[str | int] = []
    model: Any = JobConfig
    for part in location:
        fields = _fields(model)
        if not path or fields is not None:
            path.append(part)
            model = fields.get(part) if fields and part in fields else None
        else:
            break
    return tuple(path)


def _fields(model: Any) -> dict[str, Any] | None:
    """A section's fields with the section classes behind them; None for a plain value."""
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return None
    return {name: _section(info.annotation) for name, info in model.model_fields.items()}


def _section(annotation: Any) -> Any:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _suggest(path: _Path) -> str:
    """The nearest right key, here or in another section, and what is allowed here."""
    allowed = _allowed(path[:-1])
    wrong, prefix = str(path[-1]), "".join(f"{part}." for part in path[:-1])
    everywhere = dict(_all_keys(JobConfig, ""))
    same_name = [key for key, name in everywhere.items() if name == wrong]
    near = get_close_matches(wrong, allowed, n=1)
    far = get_close_matches(wrong, list(everywhere.values()), n=1)
    if near:
        hint = f"; did you mean {prefix}{near[0]}?"
    elif same_name:
        hint = f"; did you mean {same_name[0]}?"
    elif far:
        hint = f"; did you mean {next(k for k, n in everywhere.items() if n == far[0])}?"
    else:
        hint = ""
    return (
        f"{hint} allowed here: {', '.join(allowed)}"
        if hint
        else f"; allowed here: {', '.join(allowed)}"
    )


def _allowed(path: _Path) -> list[str]:
    model: Any = JobConfig
    for part in path:
        model = (_fields(model) or {}).get(str(part))
    return list(_fields(model) or {})


def _all_keys(model: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for name, section in (_fields(model) or {}).items():
        yield f"{prefix}{name}", name
        yield from _all_keys(section, f"{prefix}{name}.")


_EXAMPLES = {
    "name": "give the run a name, such as name: support-bot",
    "model": "say which model, such as model: {base: HuggingFaceTB/SmolLM2-135M-Instruct}",
    "model.base": "give a hub id, a folder or a .gguf file",
    "data": "say what to train on, such as data: {train: train.jsonl}",
    "data.train": "give file(s) of jsonl, json, csv or parquet, a folder, or a hub id",
}


def _describe(path: _Path) -> str:
    return _EXAMPLES.get(".".join(map(str, path)), "it is required")
