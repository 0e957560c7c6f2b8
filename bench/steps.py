"""One solver step, from a model's output to its next input: ours, diffusers' schedulers, the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from bench.measure import COMPILED, DEVICE, OURS, Call, Comparison
from moe_sampler import Expert, plan
from moe_sampler.kernels import sampler_step_

SUITE = "sampler step"
STEPS, STEP, SCALE, SHIFT = 50, 25, 7.5, 2.0
BASE = (1, 4, 64, 64)
SHAPES = ((4, 4, 64, 64), (1, 4, 128, 128), (16, 4, 64, 64))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Step = Callable[[Tensor, Tensor], Tensor]
Provider = Callable[["_Latents", float], Call]


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
        history = [torch.zeros_like(x)] if compiled.memories else []
        seeds = torch.arange(len(x), device=DEVICE) if compiled.needs_noise else None

        def step() -> Tensor:
            return sampler_step_(
                x, [self.output], table, STEP, memories=history, next_inputs=following, seeds=seeds
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
        return scheduler.step(output, timestep, x, return_dict=False)[0]

    return step


def _recipe_step(scheduler: Any) -> Step:
    scheduler.set_timesteps(STEPS, device=DEVICE)
    timestep = scheduler.timesteps[STEP]
    return lambda x, velocity: recipe.sol_step(x, velocity, timestep, scheduler)


def _written_out_step(ancestral: bool) -> Step:
    scheduler = DDPMScheduler(**_PLAIN)
    scheduler.set_timesteps(STEPS)
    here, there = (scheduler.alphas_cumprod[t].to(DEVICE) for t in scheduler.timesteps[STEP : STEP + 2])
    return lambda x, velocity: recipe.sol_step_written_out(x, velocity, here, there, ancestral)


def _recipe_euler() -> Step:
    sigma, sigma_next = torch.tensor(0.52, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    return lambda x, velocity: recipe.lune_step(x, velocity, sigma, sigma_next, SHIFT)


_PLAIN = {"clip_sample": False, "timestep_spacing": "trailing"}
_V = {"prediction_type": "v_prediction", **_PLAIN}


def _ours(**settings: Any) -> Provider:
    return lambda latents, scale: latents.ours(Expert.sol(guidance_scale=scale, **settings))


def _theirs(step: Callable[[], Step]) -> Provider:
    return lambda latents, scale: latents.theirs(step())


_RECIPE = _theirs(lambda: _recipe_step(DDPMScheduler(**_PLAIN)))
KINDS: dict[str, dict[str, Provider]] = {
    "VP, deterministic": {
        OURS: _ours(solver="ddim"),
        "diffusers DDIM": _theirs(lambda: _scheduler_step(DDIMScheduler(**_V))),
        "recipe, DDIM": _theirs(lambda: _recipe_step(DDIMScheduler(**_PLAIN))),
        "recipe": _RECIPE,
    },
    "VP, ancestral": {
        OURS: _ours(),
        "diffusers DDPM": _theirs(lambda: _scheduler_step(DDPMScheduler(**_V))),
        "recipe": _RECIPE,
    },
    "VP, 2M history": {
        OURS: _ours(solver="dpmpp_2m"),
        "diffusers DPMSolverMultistep": _theirs(
            lambda: _scheduler_step(DPMSolverMultistepScheduler(prediction_type="v_prediction"))
        ),
    },
    "flow, Euler": {
        OURS: lambda latents, scale: latents.ours(Expert.lune(guidance_scale=scale)),
        "diffusers FlowMatchEuler": _theirs(
            lambda: _scheduler_step(FlowMatchEulerDiscreteScheduler(shift=SHIFT))
        ),
        "recipe": _theirs(_recipe_euler),
    },
}
_COMPILED = {
    "VP, deterministic": _theirs(lambda: _written_out_step(ancestral=False)),
    "VP, ancestral": _theirs(lambda: _written_out_step(ancestral=True)),
    "flow, Euler": _theirs(_recipe_euler),
}


def _comparison(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, guided: bool, compiled: bool
) -> Comparison:
    scale = SCALE if guided else 1.0
    make = dict(KINDS[kind])
    if compiled and kind in _COMPILED:
        make[f"recipe written out, {COMPILED}"] = lambda latents, scale: torch.compile(
            _COMPILED[kind](latents, scale), dynamic=False
        )

    def provider(name: str) -> Callable[[], Call]:
        return lambda: make[name](_Latents(shape, dtype, guided), scale)

    case = {
        "step": kind,
        "shape": "x".join(map(str, shape)),
        "output": str(dtype).removeprefix("torch."),
        "guidance": "guided" if guided else "plain",
    }
    outputs = 2 if guided else 1
    history = 8 if kind == "VP, 2M history" else 0
    moved = torch.Size(shape).numel() * (8 + 2 * outputs * dtype.itemsize + history)
    return Comparison(SUITE, case, {name: provider(name) for name in make}, moved)


def comparisons() -> Iterator[Comparison]:
    """Every kind of step: all dtypes at 1×4×64×64, float32 at the other sizes."""
    for kind in KINDS:
        for guided in (False, True):
            for dtype in DTYPES:
                yield _comparison(kind, BASE, dtype, guided, compiled=dtype == torch.float32)
            for shape in SHAPES:
                yield _comparison(kind, shape, torch.float32, guided, compiled=False)
