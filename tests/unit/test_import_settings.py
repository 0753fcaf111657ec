"""How large libraries are imported."""

import gc
import sys
import threading

import pytest

from orchestrator.imports import import_beside, uncollected


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_looked_for_afterwards_as_it_was_before(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ImportError), uncollected():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_library_is_imported_while_the_caller_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    before = set(threading.enumerate())
    import_beside(["this"])
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert "this" in sys.modules
