"""One solver step, from a model's output to its next input: ours, diffusers' schedulers, the recipe by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from bench import recipe
from bench.measure import DEVICE, OURS, Comparison
from moe_sampler import Expert, plan
from moe_sampler.kernels import sampler_step_

STEPS, STEP, SCALE, SHIFT = 50, 25, 7.5, 2.0
BASE = (1, 4, 64, 64)
SHAPES = ((4, 4, 64, 64), (1, 4, 128, 128), (16, 4, 64, 64))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Step = Callable[[Tensor, Tensor], Tensor]
Call = Callable[[], Any]


class _Latents:
    """A state in float32 and a model output in the model's dtype."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, guided: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        twice = (2 * shape[0], *shape[1:]) if guided else shape
        self.guided, self.dtype = guided, dtype
        self.x = torch.randn(shape, generator=generator).to(DEVICE)
        self.output = torch.randn(twice, generator=generator).to(DEVICE, dtype)

    def ours(self, expert: Expert) -> Call:
        compiled = plan(expert, steps=STEPS)
        table, x = compiled.table(DEVICE), self.x.clone()
        # A plain float32 model takes the state itself.
        same = not self.guided and self.dtype == torch.float32
        following = [] if same else [torch.empty_like(self.output)]
        history = torch.zeros_like(x) if expert.solver == "dpmpp_2m" else None
        seeds = torch.arange(len(x), device=DEVICE) if compiled.needs_noise else None

        def step() -> Tensor:
            return sampler_step_(
                x, [self.output], table, STEP, x0_prev=history, next_inputs=following, seeds=seeds
            )

        return step

    def theirs(self, step: Step) -> Call:
        """Guidance before the step and the next input after it, as a diffusers pipeline writes them."""

        def whole() -> Tensor:
            output = recipe.guide(self.output, SCALE) if self.guided else self.output
            x = step(self.x, output)
            return recipe.double(x, self.dtype) if self.guided else x.to(self.dtype)

        return whole


def _scheduler_step(scheduler: Any, **settings: Any) -> Step:
    scheduler.set_timesteps(STEPS, device=DEVICE, **settings)
    timestep = scheduler.timesteps[STEP]

    def step(x: Tensor, output: Tensor) -> Tensor:
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = STEP
        if isinstance(scheduler, DPMSolverMultistepScheduler):
            scheduler.model_outputs = [x, x]
            scheduler.lower_order_nums = 1
        return scheduler.step(output, timestep, x).prev_sample

    return step


def _recipe_step(scheduler: Any, timestep: int | None = None) -> Step:
    scheduler.set_timesteps(STEPS, device=DEVICE)
    timestep = scheduler.timesteps[STEP] if timestep is None else timestep
    return lambda x, velocity: recipe.sol_step(x, velocity, timestep, scheduler)


def _recipe_euler() -> Step:
    sigma, sigma_next = torch.tensor(0.52, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    return lambda x, velocity: recipe.lune_step(x, velocity, sigma, sigma_next, SHIFT)


def _compiled(step: Call) -> Call:
    return torch.compile(step, dynamic=False)


_V = {"prediction_type": "v_prediction", "clip_sample": False}


def _deterministic(latents: _Latents, scale: float) -> Mapping[str, Call]:
    return {
        OURS: latents.ours(Expert.sol(solver="ddim", guidance_scale=scale)),
        "diffusers DDIM": latents.theirs(_scheduler_step(DDIMScheduler(**_V))),
        "recipe, DDIM": latents.theirs(_recipe_step(DDIMScheduler(clip_sample=False))),
        "recipe": latents.theirs(_recipe_step(DDPMScheduler(clip_sample=False))),
    }


def _ancestral(latents: _Latents, scale: float) -> Mapping[str, Call]:
    return {
        OURS: latents.ours(Expert.sol(guidance_scale=scale)),
        "diffusers DDPM": latents.theirs(_scheduler_step(DDPMScheduler(**_V))),
        "recipe": latents.theirs(_recipe_step(DDPMScheduler(clip_sample=False))),
    }


def _flow(latents: _Latents, scale: float) -> Mapping[str, Call]:
    return {
        OURS: latents.ours(Expert.lune(guidance_scale=scale)),
        "diffusers FlowMatchEuler": latents.theirs(
            _scheduler_step(FlowMatchEulerDiscreteScheduler(shift=SHIFT))
        ),
        "recipe": latents.theirs(_recipe_euler()),
    }


def _multistep(latents: _Latents, scale: float) -> Mapping[str, Call]:
    return {
        OURS: latents.ours(Expert.sol(solver="dpmpp_2m", guidance_scale=scale)),
        "diffusers DPMSolverMultistep": latents.theirs(
            _scheduler_step(DPMSolverMultistepScheduler(prediction_type="v_prediction"))
        ),
    }


KINDS = {
    "VP, deterministic": _deterministic,
    "VP, ancestral": _ancestral,
    "VP, 2M history": _multistep,
    "flow, Euler": _flow,
}


def _comparison(kind: str, shape: tuple[int, ...], dtype: torch.dtype, guided: bool, compiled: bool) -> Comparison:
    def providers() -> dict[str, Call]:
        latents = _Latents(shape, dtype, guided)
        found = dict(KINDS[kind](latents, SCALE if guided else 1.0))
        if compiled and "recipe" in found:
            found["recipe, torch.compile"] = _compiled(found["recipe"])
        return found

    case = {
        "step": kind,
        "shape": "x".join(map(str, shape)),
        "output": str(dtype).removeprefix("torch."),
        "guidance": "guided" if guided else "plain",
    }
    outputs = 2 if guided else 1
    state = torch.Size(shape).numel()
    moved = state * (8 + 2 * outputs * dtype.itemsize + (8 if kind == "VP, 2M history" else 0))
    return Comparison("sampler step", case, providers, moved)


def comparisons() -> Iterator[Comparison]:
    for kind in KINDS:
        for guided in (False, True):
            for dtype in DTYPES:
                yield _comparison(kind, BASE, dtype, guided, compiled=dtype == torch.float32)
            for shape in SHAPES:
                yield _comparison(kind, shape, torch.float32, guided, compiled=False)
