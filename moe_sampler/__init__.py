"""Mixture-of-experts diffusion sampling: experts of different parametrizations make one image together.

`plan` compiles a run of one or several experts into a table of coefficients, `sample` runs it with one fused
kernel a step, and `HybridPipeline` is the diffusers pipeline on top of both.
"""

from typing import TYPE_CHECKING

from ._lazy import lazy_names

if TYPE_CHECKING:
    from .captioned_images import DemoScenes, ImageFolder, TarFiles, open_source
    from .experts import Expert
    from .kernels import euler_step_, philox_normal, sampler_step_, shift_sigmas, velocity_to_epsilon
    from .paths import FlowPath, Level, VPPath
    from .pipeline import HybridPipeline
    from .plan_display import plan_table
    from .plan_figure import draw_plan
    from .planning import SamplingPlan, plan
    from .predictions import add_noise, epsilon_to_x0, velocity_to_x0, x0_to_epsilon
    from .presets import ExpertSource
    from .routers import Boundary, Crossfade, PerStep, Router, Spans
    from .sampling import SamplingRun, initial_latents, noised, sample
    from .schedulers import FusedDDIMScheduler, FusedDDPMScheduler, FusedFlowMatchEulerScheduler
    from .trace import Trace

__version__ = "0.1.0"

# torch takes a second to import and diffusers several: who asks for a name pays for what that name needs.
_NAMES = {
    "captioned_images": ("DemoScenes", "ImageFolder", "TarFiles", "open_source"),
    "experts": ("Expert",),
    "kernels": ("euler_step_", "philox_normal", "sampler_step_", "shift_sigmas", "velocity_to_epsilon"),
    "paths": ("FlowPath", "Level", "VPPath"),
    "pipeline": ("HybridPipeline",),
    "plan_display": ("plan_table",),
    "plan_figure": ("draw_plan",),
    "planning": ("SamplingPlan", "plan"),
    "predictions": ("add_noise", "epsilon_to_x0", "velocity_to_x0", "x0_to_epsilon"),
    "presets": ("ExpertSource",),
    "routers": ("Boundary", "Crossfade", "PerStep", "Router", "Spans"),
    "sampling": ("SamplingRun", "initial_latents", "noised", "sample"),
    "schedulers": ("FusedDDIMScheduler", "FusedDDPMScheduler", "FusedFlowMatchEulerScheduler"),
    "trace": ("Trace",),
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
