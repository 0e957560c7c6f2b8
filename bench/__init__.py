"""Benchmarks with pytest-benchmark: `pytest bench --benchmark-only`."""

from __future__ import annotations

import sys
from pathlib import Path

# `python -m bench...` puts the repository's root first, which holds the package in pieces, and `kernels` under a
# name that is another package's: what is installed goes before it.
if sys.path and sys.path[0] in ("", str(Path(__file__).parents[1])):
    sys.path.append(sys.path.pop(0))
