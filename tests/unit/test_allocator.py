"""The heap's settings reach the process that trains, and leave the user's own word alone."""

import os
import subprocess
import sys
from typing import Any

import pytest

from orchestrator import allocator

PROGRAM = """
import os, sys
from orchestrator.allocator import restart_with_settings
restart_with_settings()
print(os.environ["MALLOC_ARENA_MAX"], os.environ["GLIBC_TUNABLES"], *sys.argv[1:])
"""
NO_CACHE = "glibc.malloc.tcache_count=0"


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": NO_CACHE}),
        (
            {"MALLOC_ARENA_MAX": "4", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
            {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:{NO_CACHE}"},
        ),
        ({"MALLOC_ARENA_MAX": "4", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=9"}, {}),
    ],
)
def test_what_the_user_has_set_stands(environment: dict[str, str], wanted: dict[str, str]) -> None:
    assert allocator.settings(environment) == wanted
    assert allocator.settings({**environment, **wanted}) == {}


def test_a_gpus_segments_grow_unless_the_user_has_said_otherwise() -> None:
    assert allocator.gpu_settings({}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert allocator.gpu_settings({name: "max_split_size_mb:512"}) == {}


def test_a_command_starts_again_once_as_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    if allocator.platform.libc_ver()[0] != "glibc" or allocator._NVIDIA.exists():
        pytest.skip("only where a CPU trains over glibc")
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "finetune", "job.yaml", "--local"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["1", NO_CACHE, "finetune", "job.yaml", "--local"], done.stderr


@pytest.mark.parametrize("why", ["other library", "GPU", "debugger", "set already"])
def test_no_command_starts_again_in_vain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, why: str
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("it started again"))
    monkeypatch.setattr(allocator, "_NVIDIA", tmp_path / "none")
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    if why == "other library":
        monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    elif why == "GPU":
        monkeypatch.setattr(allocator, "_NVIDIA", tmp_path)
    elif why == "debugger":
        monkeypatch.setattr(sys, "gettrace", lambda: print)
    else:
        for name, value in allocator.settings({}).items():
            monkeypatch.setenv(name, value)
    allocator.restart_with_settings()
