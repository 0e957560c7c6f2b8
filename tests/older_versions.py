"""What the oldest supported versions of libraries don't have."""

from __future__ import annotations

import inspect

import diffusers.schedulers
import pytest

NEEDS_A_FLOWS_EULER_A = pytest.mark.skipif(
    not hasattr(diffusers.schedulers, "LTXEulerAncestralRFScheduler"),
    reason="diffusers has LTXEulerAncestralRFScheduler, a flow's euler_a, from 0.37 on",
)
NEEDS_SIGMAS_FOR_UNIPC = pytest.mark.skipif(
    "sigmas" not in inspect.signature(diffusers.schedulers.UniPCMultistepScheduler.set_timesteps).parameters,
    reason="this diffusers' UniPCMultistepScheduler takes no sigmas, as later ones do",
)
