"""Makes `bench` importable without the repository root on the path, where `kernels` is another package."""

import importlib.util
import sys
from pathlib import Path

if "bench" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("bench", Path(__file__).parent / "bench" / "__init__.py")
    assert _spec is not None and _spec.loader is not None
    sys.modules["bench"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["bench"])
