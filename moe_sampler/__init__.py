"""Mixture-of-experts diffusion sampling: experts of different parametrizations make one image together.

`plan` compiles a run of one or several experts into a table of coefficients, `sample` runs it with one fused
kernel a step, and `HybridPipeline` is the diffusers pipeline on top of both.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .experts import Expert
from .paths import FlowPath, Level, VPPath
from .planning import SamplingPlan, plan
from .predictions import add_noise, epsilon_to_x0, velocity_to_epsilon, velocity_to_x0, x0_to_epsilon
from .routers import Boundary, Crossfade, Router, Spans
from .sampling import sample

if TYPE_CHECKING:
    from .pipeline import HybridPipeline

__all__ = [
    "Boundary",
    "Crossfade",
    "Expert",
    "FlowPath",
    "HybridPipeline",
    "Level",
    "Router",
    "SamplingPlan",
    "Spans",
    "VPPath",
    "add_noise",
    "epsilon_to_x0",
    "plan",
    "sample",
    "velocity_to_epsilon",
    "velocity_to_x0",
    "x0_to_epsilon",
]
__version__ = "0.1.0"

# diffusers and transformers take seconds to import: only who asks for the pipeline pays for them.
_LAZY = {"HybridPipeline": ".pipeline"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
