"""Everything a GPU can show, in minutes: `python -m bench.device OUT --minutes 9` (docs/GPU.md)."""

from __future__ import annotations

PARTS = {"card": 20, "tests": 120, "kernels": 45, "pipelines": 215, "student": 140}
"""In order of value, with their shares of the time. What a part leaves over goes to those after it."""
