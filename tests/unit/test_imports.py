"""Imports between the rooms run one way, and only the right rooms know Ray and MLflow."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "orchestrator"
GROUND = {"errors", "places", "quiet"}
CONFIG = GROUND | {"config", "jobfile", "identity"}
# room: the rooms it may import
MAY_IMPORT = {
    "errors": set(),
    "places": set(),
    "quiet": set(),
    "config": GROUND,
    "jobfile": GROUND | {"config"},
    "identity": GROUND | {"config"},
    "data": CONFIG,
    "model": CONFIG,
    "training": CONFIG | {"data", "model"},
    "tracking": CONFIG,
    "cluster": CONFIG | {"training", "tracking"},
    "watch": CONFIG | {"tracking"},
    "summary": CONFIG,
    "api": CONFIG | {"training", "tracking", "cluster"},
    "cli": CONFIG | {"tracking", "api", "watch", "summary"},
    "__init__": CONFIG | {"api"},
}
OUTSIDE = {"ray": {"cluster"}, "mlflow": {"tracking"}}


def imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(room: str, source: str) -> list[str]:
    found = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "orchestrator" and target != room and target not in MAY_IMPORT[room]:
            found.append(f"{room} imports {target}")
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


def test_the_check_finds_violations() -> None:
    assert violations("data", "from orchestrator.model.base import Base") == ["data imports model"]
    assert violations("training", "def f():\n    import ray.train") == ["training imports ray"]
    assert violations("model", "from mlflow import MlflowClient") == ["model imports mlflow"]
    assert violations("cluster", "from orchestrator import api") == ["cluster imports api"]


def test_reading_a_job_file_is_light() -> None:
    code = (
        "import sys; from orchestrator.jobfile import load_job; import orchestrator.cli;"
        "load_job('jobs/examples/minimal.yaml');"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'numpy'} & set(sys.modules);"
        "sys.exit(f'{heavy} imported' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
