"""How the command imports."""

from __future__ import annotations

import gc
import sys

import pytest

from moe_sampler.cli.imports import without_collecting


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_looked_for_afterwards_as_before(collects, monkeypatch, tmp_path):
    """Also where an import fails; what has been imported is left alone, and nothing else."""
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    (tmp_path / "a_module_of_this_test.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ImportError), without_collecting():
            assert not gc.isenabled()
            import no_module_of_this_name  # noqa: F401  # pyright: ignore[reportMissingImports]
        assert (gc.isenabled(), frozen) == (collects, [])
        with without_collecting():
            import a_module_of_this_test  # noqa: F401  # pyright: ignore[reportMissingImports]
        assert (gc.isenabled(), frozen) == (collects, [False])
    finally:
        (gc.enable if before else gc.disable)()
        sys.modules.pop("a_module_of_this_test", None)
