"""Who makes the images: diffusers and ours, each in the ways its users run it.

A provider takes (models, batch, steps) and returns a call that makes `batch` images, from text to pixels
[batch, 3, height, width] on the device. A new path is a new line in `PROVIDERS`, and one in `SAME_AS` if it
makes the images that another path makes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from bench.device.models import GUIDANCE, PROMPT, Models
from bench.graphs import recorded
from bench.measure import COMPILED, DEVICE, OURS
from moe_sampler import HybridPipeline

__all__ = ["COMPILERS", "DIFFUSERS", "OURS_HYBRID", "PROVIDERS", "SAME_AS", "Provider"]

Provider = Callable[[Models, int, int], Callable[[], Tensor]]
DIFFUSERS, DIFFUSERS_COMPILED = "diffusers", f"diffusers, {COMPILED}, channels-last"
OURS_HYBRID = f"{OURS}, Sol and Lune"
OURS_MAX = f'{OURS}, speed="max"'
COMPILERS = (DIFFUSERS_COMPILED, OURS_MAX)
"""Those that compile at their first call."""
_GRAPH, _GRAPHS = "whole run as one CUDA graph", "a CUDA graph an expert"


def _diffusers(models: Models, batch: int, steps: int) -> Callable[[], Tensor]:
    return _of_diffusers(models.theirs, models, batch, steps)


def _of_diffusers(
    pipe: StableDiffusionPipeline, models: Models, batch: int, steps: int
) -> Callable[[], Tensor]:
    return _images(pipe, models, batch, steps, lambda: {"generator": torch.Generator(DEVICE).manual_seed(0)})


def _images(
    pipe: Any, models: Models, batch: int, steps: int, own: Callable[[], dict[str, Any]]
) -> Callable[[], Tensor]:
    """own: what a call is given that others are not."""

    def call() -> Tensor:
        made = pipe(
            PROMPT,
            height=models.size.pixels,
            width=models.size.pixels,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            num_images_per_prompt=batch,
            output_type="pt",
            return_dict=False,
            **own(),
        )
        return cast(Tensor, made[0])

    return call


@functools.cache
def _compiled(models: Models) -> StableDiffusionPipeline:
    """diffusers as its documentation makes it fast; compiled once for each batch size."""
    unet = copy.deepcopy(models.ours.unet_sol).to(memory_format=torch.channels_last)
    # On a CPU only the path is tried: to compile would take a minute there.
    how: dict[str, Any] = {"mode": "reduce-overhead"} if DEVICE == "cuda" else {"backend": "eager"}
    return models.new_theirs(torch.compile(unet, fullgraph=True, dynamic=False, **how))


def _diffusers_compiled(models: Models, batch: int, steps: int) -> Callable[[], Tensor]:
    return _of_diffusers(_compiled(models), models, batch, steps)


def _ours(expert: str) -> Provider:
    return lambda models, batch, steps: _of_ours(models.ours, expert, models, batch, steps)


def _of_ours(
    pipe: HybridPipeline, expert: str, models: Models, batch: int, steps: int
) -> Callable[[], Tensor]:
    # All calls full, as the other providers' are, also at a speed that would reuse features.
    return _images(pipe, models, batch, steps, lambda: {"seed": 0, "expert": expert, "reuse": 1})


@functools.cache
def _recorded(models: Models) -> HybridPipeline:
    """Our pipeline with its experts' steps as CUDA graphs, recorded once for each batch size."""
    pipe = HybridPipeline.from_pipe(models.ours)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_cuda_graphs()
    return pipe


def _recorded_calls(expert: str) -> Provider:
    return lambda models, batch, steps: _of_ours(_recorded(models), expert, models, batch, steps)


@functools.cache
def _fastest(models: Models) -> HybridPipeline:
    """Our pipeline as `speed="max"` loads it: a layout for convolutions, compiled blocks, and on CUDA each
    expert's steps as a graph."""
    # What is compiled and laid out anew is its own: other paths run as they are before and after.
    changed = {name: copy.deepcopy(getattr(models.ours, name)) for name in ("unet_sol", "unet_lune", "vae")}
    pipe = HybridPipeline.from_pipe(models.ours, **changed)
    pipe.set_progress_bar_config(disable=True)
    pipe.set_speed("max" if DEVICE == "cuda" else "fast")  # on a CPU to compile would take a minute
    return pipe


def _max(models: Models, batch: int, steps: int) -> Callable[[], Tensor]:
    return _of_ours(_fastest(models), "sol", models, batch, steps)


def _whole_run(expert: str) -> Provider:
    """All steps of a run captured in one CUDA graph, which is replayed for every call."""

    def make(models: Models, batch: int, steps: int) -> Callable[[], Tensor]:
        pipe = models.ours

        @torch.no_grad()
        def encoded(prompt: str) -> Tensor:
            return pipe.encode_texts(prompt).expand(batch, -1, -1)

        cond, uncond = encoded(PROMPT).clone(), encoded("").clone()
        run = models.new_run(expert, batch, steps, cond, uncond)
        start = run.x.clone()

        def steps_of_run() -> None:
            run.index = 0
            run.advance()

        steps_of_run()  # the plan's table goes to the device
        replay = recorded(steps_of_run, DEVICE)

        @torch.no_grad()
        def call() -> Tensor:
            cond.copy_(encoded(PROMPT))
            uncond.copy_(encoded(""))
            run.x.copy_(start)
            replay()
            return pipe.decode_latents(run.x, "pt")

        return call

    return make


PROVIDERS: tuple[dict[str, Provider], ...] = (
    {
        DIFFUSERS: _diffusers,
        OURS: _ours("sol"),
        f"{OURS}, {_GRAPHS}": _recorded_calls("sol"),
        f"{OURS}, {_GRAPH}": _whole_run("sol"),
    },
    {
        OURS_HYBRID: _ours("hybrid"),
        f"{OURS_HYBRID}, {_GRAPHS}": _recorded_calls("hybrid"),
        f"{OURS_HYBRID}, {_GRAPH}": _whole_run("hybrid"),
    },
    {DIFFUSERS_COMPILED: _diffusers_compiled, OURS_MAX: _max},  # which may not end in their time
)
"""By name, in groups: each is measured at all batch sizes before the next."""
SAME_AS: dict[str, Provider] = {
    f"{name}, {graphs}": _ours(expert)
    for name, expert in ((OURS, "sol"), (OURS_HYBRID, "hybrid"))
    for graphs in (_GRAPHS, _GRAPH)
}
"""By name, the plainer path whose images it must make."""
