"""Imports between the rooms run one way, and only the right rooms know Ray and MLflow."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "orchestrator"
GROUND = {"allocator", "errors", "imports", "lengths", "places", "processor", "quiet"}
CONFIG = GROUND | {"config", "jobfile", "identity"}
# room: the rooms it may import
MAY_IMPORT: dict[str, set[str]] = {
    "allocator": set(),
    "errors": set(),
    "imports": set(),
    "lengths": set(),
    "places": set(),
    "processor": set(),
    "quiet": set(),
    "config": GROUND,
    "jobfile": GROUND | {"config"},
    "identity": GROUND | {"config"},
    "plan": CONFIG,
    "data": CONFIG,
    "model": CONFIG,
    "training": CONFIG | {"plan", "data", "model"},
    "tracking": CONFIG,
    "storage": CONFIG | {"tracking"},
    "cluster": CONFIG | {"plan", "training", "tracking", "storage"},
    "sweep": CONFIG | {"plan", "training", "tracking", "cluster"},
    "watch": CONFIG | {"tracking", "sweep"},
    "summary": CONFIG | {"sweep"},
    "kept": CONFIG | {"tracking", "storage"},
    "api": CONFIG | {"kept", "plan", "training", "tracking", "storage", "cluster", "sweep"},
    "cli": CONFIG | {"plan", "tracking", "sweep", "api", "watch", "summary"},
    "__init__": CONFIG | {"api"},
}
# library: the rooms that may import it
OUTSIDE = {"ray": {"cluster", "sweep"}, "mlflow": {"tracking"}}


def imports(source: str) -> Iterator[str]:
    """Dotted names of all imports, those inside functions and by text too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def violations(room: str, source: str) -> list[str]:
    if room not in MAY_IMPORT:
        return [f"{room} is a new room: say in MAY_IMPORT whom it may know"]
    found = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if not top:
            found.append(f"{room} imports {name}, which names no room")
        if top == "orchestrator" and target != room and target not in MAY_IMPORT[room]:
            found.append(f"{room} imports {target or 'the whole package'}")
        if top in OUTSIDE and room not in OUTSIDE[top]:
            found.append(f"{room} imports {top}")
    return found


def test_rooms_import_one_way() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    found = []
    for file in files:
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found += violations(room, file.read_text())
    assert found == []


def test_the_table_has_no_circle() -> None:
    order = list(TopologicalSorter(MAY_IMPORT).static_order())
    assert set(order) == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("data", "from orchestrator.model.base import Base", "data imports model"),
        ("data", "import orchestrator.model.base as base", "data imports model"),
        ("training", "def f():\n    import ray.train", "training imports ray"),
        ("model", "from mlflow import MlflowClient", "model imports mlflow"),
        ("sweep", "import mlflow", "sweep imports mlflow"),
        ("cluster", "from orchestrator import api", "cluster imports api"),
        ("errors", "import orchestrator", "errors imports the whole package"),
        ("data", "from ..model import base", "data imports ..model.base, which names no room"),
        ("data", "from . import rows", "data imports ..rows, which names no room"),
        ("data", "importlib.import_module('ray.data')", "data imports ray"),
        ("attic", "", "attic is a new room: say in MAY_IMPORT whom it may know"),
    ],
)
def test_the_check_finds_violations(room: str, source: str, found: str) -> None:
    assert violations(room, source) == [found]


def check_in_a_new_process(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_reading_a_job_file_is_light() -> None:
    code = (
        "import sys; from orchestrator.jobfile import load_job; import orchestrator.cli;"
        "load_job('jobs/examples/minimal.yaml');"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'peft', 'datasets', 'bitsandbytes',"
        "'pyarrow', 'numpy'} & set(sys.modules);"
        "sys.exit(f'{heavy} imported' if heavy else 0)"
    )
    check_in_a_new_process(code)


def test_a_trial_of_a_shared_engine_brings_no_torch() -> None:
    check_in_a_new_process("import sys, orchestrator.sweep.trial; sys.exit('torch' in sys.modules)")


def test_training_brings_no_compiler() -> None:
    code = (
        "import sys, torch, orchestrator.training.run;"
        "from bitsandbytes.backends.default import ops;"
        "own = ops._dequantize_4bit_compute;"
        "assert all(cell.cell_contents is own.__wrapped__ for cell in own.__closure__);"
        "assert torch.compile.__module__ == 'torch';"
        "assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    check_in_a_new_process(code)
