"""Reading a job file: YAML with line numbers, overrides, and errors a person can act on.

No message repeats what may hold a password: a text with a URI in it, or a text under `tracking`.
"""

import datetime
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarbool import ScalarBoolean
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from orchestrator.config import JobConfig
from orchestrator.errors import JobFileError

_Path = tuple[str | int, ...]
_Fault = tuple[int, str, str]
# Overrides are listed after the file's own faults, in the order they were given in.
_AFTER_THE_FILE = 10**9


@dataclass
class _Places:
    """Where each key came from: a line of the file, or an override."""

    file: str
    tree: Any
    overrides: dict[_Path, tuple[int, str]] = field(default_factory=dict)

    def find(self, path: _Path) -> tuple[int, str]:
        """A sort key and the words for the place of a key or, failing that, of its section."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.overrides:
                return self.overrides[path[:length]]
        line, in_file = self._line(path)
        if path and not in_file:
            for deeper, place in self.overrides.items():
                if deeper[: len(path)] == path:
                    return place
        return line, f"{self.file}:{line}" if line else self.file

    def overridden(self, path: _Path, place: tuple[int, str]) -> None:
        """From here on a key, and all that is below it, comes from an override."""
        kept = {old: p for old, p in self.overrides.items() if old[: len(path)] != path}
        self.overrides = {**kept, path: place}

    def _line(self, path: _Path) -> tuple[int, bool]:
        """The line of a key or of the nearest section around it, and whether the key is there."""
        node, line = self.tree, 1 if isinstance(self.tree, CommentedMap) else 0
        for part in path:
            keys = {str(key): key for key in node} if isinstance(node, CommentedMap) else {}
            if part not in keys:
                return line, False
            key = keys[str(part)]
            line = node.lc.key(key)[0] + 1 if key in (node.lc.data or ()) else line
            node = node[key]
        return line, True


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
    content = _plain(tree)
    return _validate(content, places, _override(content, overrides, places))


def job_from_mapping(mapping: Mapping[str, Any]) -> JobConfig:
    """Check a job given as a mapping; faults are named with their keys.

    Raises:
        JobFileError: a key or value is not allowed.
    """
    return _validate(_plain(mapping), _Places("job", mapping), [])


def dump_job(job: JobConfig) -> str:
    """The resolved job as YAML text that `load_job` reads back."""
    stream = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    # ruamel.yaml (0.19) adds a space where it breaks a quoted text after an escaped character.
    yaml.width = sys.maxsize
    yaml.dump(_quoted(job.model_dump(mode="json")), stream)
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
    except YAMLError as error:
        raise JobFileError(f"{file}{_mark(error, text)}: {_problem(error)}") from None
    if tree is None:
        raise JobFileError(
            f"{file}: the file is empty; it needs at least name, model.base, data.train"
        )
    if not isinstance(tree, CommentedMap):
        raise JobFileError(f"{file}:1: a job file is a mapping of keys, this is a list or a value")
    return tree


def _mark(error: YAMLError, text: str) -> str:
    """`:line:column` of a fault in the YAML, if known."""
    if isinstance(error, ReaderError):
        before = text[: error.position].split("\n")
        return f":{len(before)}:{len(before[-1]) + 1}"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f":{mark.line + 1}:{mark.column + 1}" if mark else ""


def _problem(error: YAMLError) -> str:
    """What is wrong with the YAML, in one line, without a value of the file."""
    if isinstance(error, MarkedYAMLError):
        said = ", ".join(part for part in (error.context, error.problem) if part)
        said = said.partition(" with value ")[0]  # of a key that stands there twice
    else:
        said = str(error)
    said = (said or "not valid YAML").splitlines()[0]
    return re.sub(r"(['\"]).*\1", lambda quoted: _safe(quoted[0]), said)


def _plain(value: Any) -> Any:
    """The same content in Python's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, ScalarBoolean):
        return bool(value)
    kind = next((k for k in (bool, int, float, str) if isinstance(value, k)), None)
    return kind(value) if kind else value


def _quoted(value: Any) -> Any:
    """Quote texts with characters that YAML would fold or drop."""
    if isinstance(value, dict):
        return {_quoted(key): _quoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    odd = isinstance(value, str) and not value.isprintable()
    return DoubleQuotedScalarString(value) if odd else value


def _override(content: Any, overrides: Sequence[str], places: _Places) -> list[_Fault]:
    """Write the overrides into the content; those that cannot be written are faults."""
    faults = []
    for number, text in enumerate(overrides):
        place = (_AFTER_THE_FILE + number, f"--set {_shown_override(text)}")
        key, equals, value = text.partition("=")
        path = _split(key)
        if not equals or not all(path):
            faults.append((*place, "give KEY=VALUE, such as lora.rank=8"))
            continue
        try:
            parsed = _plain(YAML(typ="safe", pure=True).load(value))
        except YAMLError as error:
            faults.append((*place, f"the value is not valid YAML: {_problem(error)}"))
            continue
        blocked = _write(content, path, parsed)
        if blocked:
            faults.append((*place, f"{_dotted(blocked)} holds a value, so it has no keys to set"))
        else:
            places.overridden(path, place)
    return faults


def _split(key: str) -> tuple[str, ...]:
    """The parts of a dotted key; below a free mapping all the rest is one key."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        if _is_free(tuple(parts[:length])):
            return (*parts[:length], ".".join(parts[length:]))
    return tuple(parts)


def _write(content: Any, path: tuple[str, ...], value: Any) -> tuple[str, ...]:
    """Set a key, making sections that are absent or null; returns the path in the way, if any."""
    node = content
    for depth, part in enumerate(path[:-1], start=1):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            return path[:depth]
    node[path[-1]] = value
    return ()


def _shown_override(text: str) -> str:
    """An override as a message may repeat it: a mistyped `tracking` hides its value too."""
    head = re.split(r"[.=]", text, maxsplit=1)[0]
    if _safe(text) == text and head != "tracking" and head in _allowed(()):
        return text
    key = re.match(r"[\w.-]*", text)
    return f"{key[0] if key else ''}=..."


def _shown(path: _Path, value: Any) -> str:
    """A value as the file would write it, if a message may repeat it."""
    if isinstance(value, TaggedScalar):
        return "a tagged value"
    if isinstance(value, datetime.date):
        return value.isoformat()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if path[:1] == ("tracking",) and not isinstance(value, (int, float)):
        return "that value"
    return _safe(repr(value), "that value")


def _safe(text: str, instead: str = "...") -> str:
    return instead if re.search(r"://|@", text) else text


def _dotted(path: _Path) -> str:
    return ".".join(_safe(str(part)) for part in path)


def _validate(content: Any, places: _Places, faults: list[_Fault]) -> JobConfig:
    try:
        job = JobConfig.model_validate(content)
    except ValidationError as error:
        faults += [(*places.find(path), text) for path, text in _faults(error)]
    if faults:
        lines = [f"{place}: {text}" for _, place, text in sorted(set(faults))]
        raise JobFileError("\n".join(lines))
    return job


def _faults(error: ValidationError) -> Iterator[tuple[_Path, str]]:
    """Each fault once: its path and what is wrong, right and allowed."""
    seen: set[_Path] = set()
    for item in error.errors(include_url=False):
        path = _real_path(item["loc"])
        if path in seen:
            continue
        seen.add(path)
        key, kind = _dotted(path), item["type"]
        if kind == "extra_forbidden":
            yield path, f"{key}: unknown key{_suggest(path)}"
        elif kind == "missing":
            yield path, f"{key}: missing; {_EXAMPLES.get(key, 'it is required')}"
        elif path:
            yield path, f"{key}: {_wrong(path, item)}"
        else:
            whole = kind in _SECTION_KINDS
            yield path, "a job is a mapping of keys" if whole else _clean(item["msg"])


# What pydantic's kinds of a wrong type ask for.
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
}
_SECTION_KINDS = ("model_type", "model_attributes_type", "dict_type")


def _wrong(path: _Path, item: Any) -> str:
    kind, value, shown = item["type"], item["input"], _shown(path, item["input"])
    if kind in _SECTION_KINDS:
        keys = ", ".join(_allowed(path))
        takes = f"{path[-1]} takes a mapping of keys{': ' if keys else ''}{keys}"
        return f"{shown} is not allowed; {takes}"
    if kind == "literal_error":
        return f"{shown} is not allowed; {_choices(str(value), item['ctx']['expected'])}"
    if kind == "string_type" and isinstance(value, (int, float, datetime.date)):
        return f"{shown} is not text; put it in quotes"
    if kind in _TYPES and isinstance(value, str):
        return f"{shown} is text; give {_TYPES[kind]} without quotes"
    wanted = f"give {_TYPES[kind]}" if kind in _TYPES else _clean(item["msg"])
    return f"{shown} is not allowed; {wanted}"


def _choices(value: str, expected: str) -> str:
    """The values a key can hold, from pydantic's "'a', 'b' or 'c'"; the nearest one first."""
    allowed = re.findall(r"'([^']*)'", expected)
    near = get_close_matches(value.lower(), allowed, n=1)
    return "".join(f"did you mean {n}? " for n in near) + f"allowed: {', '.join(allowed)}"


def _clean(message: str) -> str:
    text = message.removeprefix("Value error, ")
    text = re.sub(r"^(Input|String) should (be|have)", r"it must \2", text)
    return text[:1].lower() + text[1:]


def _real_path(location: tuple[str | int, ...]) -> _Path:
    """The path in the job file; pydantic adds the names of a union's branches to it."""
    for length in range(1, len(location)):
        if _is_free(location[:length]):
            return location[: length + 1]
        if not _allowed(location[:length]):
            return location[:length]
    return location


def _is_free(path: _Path) -> bool:
    """Whether a key holds a mapping whose keys the user chooses."""
    section = _model(path[:-1])
    info = section.model_fields.get(str(path[-1])) if section else None
    return info is not None and get_origin(info.annotation) is dict


def _model(path: _Path) -> type[BaseModel] | None:
    """The class of the section at a path, if there is one."""
    model: type[BaseModel] | None = JobConfig
    for part in path:
        info = model.model_fields.get(str(part)) if model else None
        model = _section(info.annotation) if info else None
    return model


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _suggest(path: _Path) -> str:
    """The nearest right key, here or in another section, and what is allowed here."""
    section, wrong = path[:-1], str(path[-1]).lower().replace("-", "_")
    here = {name: _dotted((*section, name)) for name in _allowed(section)}
    everywhere = list(_all_keys(()))
    names = sorted({key[-1] for key in everywhere})
    near = get_close_matches(wrong, here, n=1) or get_close_matches(wrong, names, n=1)
    if "." in wrong and (*section, *wrong.split(".")) in everywhere:
        hint = f"; write it nested, as {wrong.replace('.', ': {')}: ...}};"
    elif wrong in here:
        hint = f"; did you mean {here[wrong]}?"
    elif wrong in names:
        hint = f"; did you mean {_spots(wrong, everywhere)}?"
    elif near:
        hint = f"; did you mean {here.get(near[0]) or _spots(near[0], everywhere)}?"
    else:
        hint = ";"
    return f"{hint} allowed here: {', '.join(here)}"


def _spots(name: str, everywhere: list[tuple[str, ...]]) -> str:
    """Every key of the job file that ends in a name."""
    return " or ".join(_dotted(key) for key in everywhere if key[-1] == name)


def _allowed(path: _Path) -> list[str]:
    section = _model(path)
    return list(section.model_fields) if section else []


def _all_keys(section: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name in _allowed(section):
        yield (*section, name)
        yield from _all_keys((*section, name))


_EXAMPLES = {
    "name": "give the run a name, such as name: support-bot",
    "model": "say which model, such as model: {base: HuggingFaceTB/SmolLM2-135M-Instruct}",
    "model.base": "give a hub id, a folder or a .gguf file",
    "data": "say what to train on, such as data: {train: train.jsonl}",
    "data.train": "give file(s) of jsonl, json, csv or parquet, a folder, or a hub id",
}
