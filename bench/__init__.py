"""Benchmarks with pytest-benchmark: `pytest bench --benchmark-only`."""

from __future__ import annotations

import sys
from pathlib import Path

# `python -m bench...` puts the repository's root first. It holds the package in pieces, one of them under the
# name of another package, `kernels`: what is installed goes before it.
if sys.path and sys.path[0] in ("", str(Path(__file__).parents[1])):
    sys.path.append(sys.path.pop(0))
