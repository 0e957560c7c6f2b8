"""Mixture-of-experts diffusion sampling: experts of different parametrizations make one image together.

`plan` compiles a run of one or several experts into a table of coefficients, `sample` runs it with one fused
kernel a step, and `HybridPipeline` is the diffusers pipeline on top of both.
"""

from typing import TYPE_CHECKING

from ._lazy import lazy_names

if TYPE_CHECKING:
    from moe_sampler.kernels import (
        euler_step_,
        philox_normal,
        sampler_step_,
        shift_sigmas,
        velocity_to_epsilon,
    )

    from .data.folders import ImageFolder
    from .data.scenes import DemoScenes
    from .data.sources import open_source
    from .data.tars import TarFiles
    from .loading.presets import ExpertSource
    from .pipelines.hybrid import HybridPipeline
    from .sampling.experts import Expert
    from .sampling.initial import initial_latents, noised
    from .sampling.loop import SamplingRun, sample
    from .sampling.paths import FlowPath, Level, VPPath
    from .sampling.planner import SamplingPlan, plan
    from .sampling.predictions import add_noise, epsilon_to_x0, velocity_to_x0, x0_to_epsilon
    from .sampling.routers import Boundary, Crossfade, PerStep, Router, Spans
    from .schedulers import FusedDDIMScheduler, FusedDDPMScheduler, FusedFlowMatchEulerScheduler
    from .viewing.plan_figure import draw_plan
    from .viewing.plan_table import plan_table
    from .viewing.trace import Trace

__version__ = "0.1.0"

# torch takes a second to import and diffusers several: who asks for a name pays for what that name needs.
_NAMES = {
    "data.folders": ("ImageFolder",),
    "data.scenes": ("DemoScenes",),
    "data.sources": ("open_source",),
    "data.tars": ("TarFiles",),
    "sampling.experts": ("Expert",),
    "kernels": ("euler_step_", "philox_normal", "sampler_step_", "shift_sigmas", "velocity_to_epsilon"),
    "sampling.paths": ("FlowPath", "Level", "VPPath"),
    "pipelines.hybrid": ("HybridPipeline",),
    "viewing.plan_table": ("plan_table",),
    "viewing.plan_figure": ("draw_plan",),
    "sampling.planner": ("SamplingPlan", "plan"),
    "sampling.predictions": ("add_noise", "epsilon_to_x0", "velocity_to_x0", "x0_to_epsilon"),
    "loading.presets": ("ExpertSource",),
    "sampling.routers": ("Boundary", "Crossfade", "PerStep", "Router", "Spans"),
    "sampling.initial": ("initial_latents", "noised"),
    "sampling.loop": ("SamplingRun", "sample"),
    "schedulers": ("FusedDDIMScheduler", "FusedDDPMScheduler", "FusedFlowMatchEulerScheduler"),
    "viewing.trace": ("Trace",),
}

__all__ = [
    "Boundary",
    "Crossfade",
    "DemoScenes",
    "Expert",
    "ExpertSource",
    "FlowPath",
    "FusedDDIMScheduler",
    "FusedDDPMScheduler",
    "FusedFlowMatchEulerScheduler",
    "HybridPipeline",
    "ImageFolder",
    "Level",
    "PerStep",
    "Router",
    "SamplingPlan",
    "SamplingRun",
    "Spans",
    "TarFiles",
    "Trace",
    "VPPath",
    "add_noise",
    "draw_plan",
    "epsilon_to_x0",
    "euler_step_",
    "initial_latents",
    "noised",
    "open_source",
    "philox_normal",
    "plan",
    "plan_table",
    "sample",
    "sampler_step_",
    "shift_sigmas",
    "velocity_to_epsilon",
    "velocity_to_x0",
    "x0_to_epsilon",
]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
