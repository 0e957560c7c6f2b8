"""End to end: images a second and the share of time outside the models, beside diffusers' own pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from bench.measure import DEVICE, OURS, Call, environment, interleave
from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path

SUITE = "end to end"
STEPS, PROMPT, GUIDANCE = 20, "a castle with two towers, at dusk", 2.5


def _pipelines() -> tuple[HybridPipeline, StableDiffusionPipeline]:
    """Both around the same modules."""
    ours = HybridPipeline.from_pretrained(experts_path()).to(DEVICE)
    # A dict, because diffusers annotates what may be None as if it must not.
    parts: dict[str, Any] = {
        "vae": ours.vae,
        "text_encoder": ours.text_encoder,
        "tokenizer": ours.tokenizer,
        "unet": ours.unet_sol,
        "scheduler": DDPMScheduler.from_config(ours.scheduler_sol.config),
        "safety_checker": None,
        "feature_extractor": None,
    }
    theirs = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return ours, theirs


@contextmanager
def time_inside(modules: list[torch.nn.Module]) -> Iterator[list[float]]:
    """Seconds of every call of the modules, waiting for the device after each."""
    taken: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
            return result

        return wrapper

    names = [(m, "decode" if hasattr(m, "decode") else "forward") for m in modules]
    for module, name in names:
        setattr(module, name, timed(getattr(module, name)))
    try:
        yield taken
    finally:
        for module, name in names:
            delattr(module, name)


def outside(pipe: Any, call: Call, calls: int = 5) -> float:
    """Share of a call's time that is spent in none of the models, the median of several calls."""
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    shares = []
    for _ in range(calls):
        with time_inside(modules) as taken:
            start = time.perf_counter()
            call()
            shares.append(1 - sum(taken) / (time.perf_counter() - start))
    return sorted(shares)[len(shares) // 2]


def _calls(ours: HybridPipeline, theirs: StableDiffusionPipeline, batch: int) -> dict[str, tuple[Any, Call]]:
    """By provider, its pipeline and a call that makes `batch` images."""
    shared = {
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "num_images_per_prompt": batch,
    }
    size = ours.unet_sol.config["sample_size"] * ours.vae_scale_factor

    def diffusers() -> Any:
        generator = torch.Generator().manual_seed(0)
        return theirs(PROMPT, height=size, width=size, generator=generator, **shared)

    return {
        OURS: (ours, lambda: ours(PROMPT, expert="sol", seed=0, **shared)),
        f"{OURS}, Sol and Lune": (ours, lambda: ours(PROMPT, seed=0, **shared)),
        "diffusers": (theirs, diffusers),
    }


def rows() -> list[dict[str, object]]:
    """One row a pipeline and batch size."""
    pipelines = _pipelines()
    found = []
    for batch in (1, 4, 16):
        calls = _calls(*pipelines, batch)
        seconds = interleave({name: call for name, (_, call) in calls.items()}, seconds=8.0)
        for name, (pipe, call) in calls.items():
            found.append(
                {
                    "suite": SUITE,
                    "batch": batch,
                    "steps": STEPS,
                    "provider": name,
                    "images_per_s": f"{batch / np.median(seconds[name]):.2f}",
                    "outside_models": f"{outside(pipe, call):.2%}",
                    "rounds": len(seconds[name]),
                    **environment(),
                }
            )
    return found
