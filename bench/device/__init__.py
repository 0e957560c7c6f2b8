"""Everything a GPU can show, in minutes: `python -m bench.device OUT --minutes 9` (docs/GPU.md)."""

from __future__ import annotations

PARTS = {"card": 30, "tests": 130, "kernels": 110, "pipelines": 195, "student": 75}
"""In order of value, with their shares of the time. What a part leaves over goes to those after it."""
