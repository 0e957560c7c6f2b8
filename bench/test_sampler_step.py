"""One solver step outside the model: the fused operator beside what a user would call instead.

    pytest bench --benchmark-only --benchmark-group-by=param:shape,param:kind

Compare medians within a group of one run; absolute times say more about the machine.
"""

from __future__ import annotations

import diffusers
import pytest
import torch

from moe_sampler import Expert, plan
from moe_sampler.kernels import sampler_step_

SHAPES = [(1, 4, 64, 64), (4, 4, 64, 64), (1, 4, 128, 128)]
STEPS, STEP, SCALE = 50, 25, 7.5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ours(expert: Expert, shape: tuple[int, ...]):
    table = plan(expert, steps=STEPS).table(DEVICE)
    x, output = torch.randn(shape, device=DEVICE), torch.randn((2 * shape[0], *shape[1:]), device=DEVICE)
    following, seeds = torch.empty_like(output), torch.arange(shape[0], device=DEVICE)
    noise = {"seeds": seeds} if expert.solver == "ddpm" else {}
    return lambda: sampler_step_(x, [output], table, STEP, next_inputs=[following], **noise)


def theirs(scheduler, shape: tuple[int, ...], **settings):
    """What a diffusers pipeline does between two model calls."""
    scheduler.set_timesteps(STEPS, device=DEVICE, **settings)
    x, output = torch.randn(shape, device=DEVICE), torch.randn((2 * shape[0], *shape[1:]), device=DEVICE)
    t = scheduler.timesteps[STEP]

    def step():
        uncond, cond = output.chunk(2)
        guided = uncond + SCALE * (cond - uncond)
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = STEP
        stepped = scheduler.step(guided, t, x).prev_sample
        return torch.cat([stepped, stepped])

    return step


PROVIDERS = {
    ("deterministic, VP", "moe-sampler"): lambda s: ours(Expert.sol(solver="ddim", guidance_scale=SCALE), s),
    ("deterministic, VP", "diffusers DDIM"): lambda s: theirs(
        diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False), s
    ),
    ("deterministic, flow", "moe-sampler"): lambda s: ours(Expert.lune(guidance_scale=SCALE), s),
    ("deterministic, flow", "diffusers FlowMatchEuler"): lambda s: theirs(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0), s
    ),
    ("ancestral, VP", "moe-sampler"): lambda s: ours(Expert.sol(guidance_scale=SCALE), s),
    ("ancestral, VP", "diffusers DDPM"): lambda s: theirs(
        diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False), s
    ),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "provider"), PROVIDERS)
def test_step(benchmark, kind, provider, shape):
    step = PROVIDERS[kind, provider](shape)

    def run():
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, warmup_rounds=20, rounds=200)
