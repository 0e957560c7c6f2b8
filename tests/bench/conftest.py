"""Makes `bench` importable without the repository root on the path, where `kernels` is another package."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

if "bench" not in sys.modules:
    spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])
