"""What a saved pipeline's folder holds for diffusers' own `DiffusionPipeline.from_pretrained`: the class's
name as code, and a model card that says how."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..loading.folders import INDEX, SHARED

__all__ = ["CARD", "write_code_reference"]

_MODULE = "pipeline"
CARD = "README.md"

_CODE = '''"""The class of this folder's pipeline, for diffusers' DiffusionPipeline.from_pretrained.

It is in the package moe-sampler, whose HybridPipeline.from_pretrained loads the folder without this file.
"""

import moe_sampler


class HybridPipeline(moe_sampler.HybridPipeline):
    def __init__(
        self,
{arguments}
    ):
        super().__init__(
{passed}
        )
'''

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- moe-sampler
---

# Experts: {names}

A pipeline of moe-sampler: {experts}, which make one image together, in this order.

```python
from moe_sampler import HybridPipeline

pipe = HybridPipeline.from_pretrained("FOLDER or owner/name")
image = pipe("{prompt}", seed=0).images[0]
```

Through diffusers alone, with moe-sampler installed, as `pipeline.py` imports its class from there:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER or owner/name", trust_remote_code=True)
```

| default | |
|---|---|
{defaults}
"""


def write_code_reference(
    folder: Path, experts: Sequence[str], settings: Mapping[str, Any], *, card: bool
) -> None:
    """Add `pipeline.py`, named in the folder's index, and a model card, if one is wanted.

    Args:
        folder: that a pipeline was saved to.
        experts: names.
        settings: default settings.
    """
    components = [*SHARED, *(f"{part}_{name}" for name in experts for part in ("unet", "scheduler"))]
    arguments = [f"{name}," for name in components] + [f"{name}=None," for name in settings]
    passed = [f"{name}={name}," for name in (*components, *settings)]
    indented = {
        "arguments": "\n".join(f"        {line}" for line in arguments),
        "passed": "\n".join(f"            {line}" for line in passed),
    }
    (folder / f"{_MODULE}.py").write_text(_CODE.format(**indented), encoding="utf-8")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["_class_name"] = [_MODULE, "HybridPipeline"]
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if card:
        (folder / CARD).write_text(_card(experts, settings), encoding="utf-8")


def _card(experts: Sequence[str], settings: Mapping[str, Any]) -> str:
    rows = [f"| `{name}` | {value} |" for name, value in settings.items() if name != "experts"]
    return _CARD.format(
        names=", ".join(experts),
        experts=f"expert{'s' if len(experts) > 1 else ''} {' and '.join(experts)}",
        prompt="a castle by a lake",
        defaults="\n".join(rows),
    )
