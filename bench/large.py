"""End to end at Stable Diffusion 1.5's size: images a second, at equal steps, guidance and number format.

Random weights, which make noise at the price of pictures; 256x256 on a CPU, 512x512 on CUDA. One UNet is both
of our experts.

`python -m bench.large` takes a quarter of an hour on two idle cores and 15 GB of memory, half as much
again of both with `--compile`. It prints the table, writes bench/results/large.csv and renews the table
in docs/PERFORMANCE.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet
from transformers import CLIPTextConfig, CLIPTextModel

from bench.__main__ import environment_line
from bench.make_random_sd15 import TEXT_ENCODER, VAE, random_weights
from bench.measure import DEVICE, ENVIRONMENT, OURS, Call, environment, in_turn
from bench.pages import PERFORMANCE, renew_page
from bench.report import RESULTS, markdown, write_csv
from moe_sampler import HybridPipeline
from moe_sampler.architectures.unet import SD15_UNET
from moe_sampler.demo import experts_path
from moe_sampler.loading.folders import load_tokenizer
from moe_sampler.pipelines.speed import Speed, fast_dtype

STEPS, PROMPT, GUIDANCE = 20, "a castle with two towers, at dusk", 7.5
SIDE = 512 if DEVICE == "cuda" else 256
CONFIGS: dict[str, Any] = {"unet": SD15_UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}


def _filled(model: torch.nn.Module, seed: int, dtype: torch.dtype) -> Any:
    model.load_state_dict(random_weights(model, seed, dtype), assign=True)
    return model.to(DEVICE).eval()


def _modules(dtype: torch.dtype) -> dict[str, Any]:
    """VAE, text encoder, tokenizer and UNet of a number format."""
    from transformers import CLIPTokenizer

    made = {
        "vae": lambda: AutoencoderKL.from_config(CONFIGS["vae"]),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CONFIGS["text_encoder"])),
        "unet": lambda: UNet.from_config(dict(CONFIGS["unet"])),
    }
    filled = {name: _filled(make(), seed, dtype) for seed, (name, make) in enumerate(made.items())}
    return {**filled, "tokenizer": load_tokenizer(CLIPTokenizer, experts_path() / "tokenizer")}


def _ours(modules: dict[str, Any]) -> HybridPipeline:
    unet = modules["unet"]
    shared = {name: modules[name] for name in ("vae", "text_encoder", "tokenizer")}
    schedulers = {
        "scheduler_sol": DDPMScheduler(prediction_type="v_prediction"),
        "scheduler_lune": FlowMatchEulerDiscreteScheduler(shift=2.0),
    }
    pipe = HybridPipeline(**shared, unet_sol=unet, unet_lune=unet, **schedulers, handoff=0.7)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _theirs(modules: dict[str, Any]) -> StableDiffusionPipeline:
    # Dicts, because diffusers annotates what may be None, and any scheduler, as if they must not be.
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    absent |= {"scheduler": DDPMScheduler(prediction_type="v_prediction")}
    pipe = StableDiffusionPipeline(**modules, **absent, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _theirs_laid_out(dtype: torch.dtype, compiled: bool) -> StableDiffusionPipeline:
    """What diffusers' guide to speed offers: number format, layout, fused projections, compiled blocks."""
    pipe = _theirs(_modules(dtype))
    for module in (pipe.unet, pipe.vae):
        module.to(memory_format=torch.channels_last)
    pipe.fuse_qkv_projections()
    if compiled:
        pipe.unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return pipe


def _ours_fast(dtype: torch.dtype, speed: Speed) -> HybridPipeline:
    pipe = _ours(_modules(dtype))
    pipe.set_speed(speed)
    return pipe


def providers(compiled: bool) -> dict[str, Call]:
    """By name, a call that makes one image; `compiled` also those that compile, and DeepCache where it is
    installed."""
    shared: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    shared |= {"height": SIDE, "width": SIDE, "output_type": "np"}
    fast = fast_dtype(DEVICE)
    name = str(fast).removeprefix("torch.")

    def theirs(pipe: StableDiffusionPipeline) -> Call:
        return lambda: pipe(PROMPT, generator=torch.Generator().manual_seed(0), **shared)

    def ours(pipe: HybridPipeline, **settings: Any) -> Call:
        return lambda: pipe(PROMPT, seed=0, **shared, **settings)

    plain, fast_pipe = _modules(torch.float32), _ours_fast(fast, "fast")
    theirs_in_short = _theirs(_modules(fast))
    found: dict[str, Call] = {
        "diffusers, float32": theirs(_theirs(plain)),
        f"diffusers, {name}": theirs(theirs_in_short),
        f"diffusers, {name}, channels last, fused": theirs(_theirs_laid_out(fast, compiled=False)),
        f"{OURS}, float32": ours(_ours(plain)),
        f"{OURS}, fast": ours(fast_pipe),
        f"{OURS}, fast, 1 of 2 full": ours(fast_pipe, reuse=2),
        f"{OURS}, fast, all full": ours(fast_pipe, reuse=1),
    }
    if compiled:
        found[f"diffusers, {name}, channels last, fused, compiled"] = theirs(
            _theirs_laid_out(fast, compiled=True)
        )
        max_pipe = _ours_fast(fast, "max")
        found[f"{OURS}, max"] = ours(max_pipe)
        found[f"{OURS}, max, all full"] = ours(max_pipe, reuse=1)
    if importlib.util.find_spec("DeepCache") is not None:
        found[f"diffusers, {name}, DeepCache 1 of 3"] = _deep_cache(theirs_in_short, theirs)
    return found


def _deep_cache(pipe: StableDiffusionPipeline, call: Callable[[Any], Call]) -> Call:
    """It replaces the UNet's blocks' forwards while it is on, so only for the call."""
    from DeepCache import DeepCacheSDHelper  # pyright: ignore[reportMissingImports]: optional

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    plain = call(pipe)

    def cached() -> Any:
        helper.enable()
        try:
            return plain()
        finally:
            helper.disable()

    return cached


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, the providers taking turns in an order that moves on by one every round; a first
    call of each doesn't count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn, name in in_turn(list(calls), rounds + 1):
        start = time.perf_counter()
        calls[name]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        if turn:
            taken[name].append(time.perf_counter() - start)
    return taken


def rows(rounds: int = 3, compiled: bool = False) -> list[dict[str, object]]:
    """One row a provider."""
    taken = interleaved(providers(compiled), rounds)
    medians = {name: float(np.median(each)) for name, each in taken.items()}
    slow = medians["diffusers, float32"]
    return [
        {
            "size": f"{SIDE}x{SIDE}",
            "steps": STEPS,
            "provider": name,
            "seconds_an_image": f"{median:.2f}",
            "times_diffusers": f"{slow / median:.2f}",
            "rounds": rounds,
            **environment(),
        }
        for name, median in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="images each, after a first that doesn't count")
    parser.add_argument("--compile", action="store_true", help="those that compile, too: minutes more each")
    options = parser.parse_args()
    table = rows(options.rounds, options.compile)
    write_csv(table, RESULTS / "large.csv")
    shown = markdown(table, [name for name in table[0] if name not in ENVIRONMENT])
    renew_page(PERFORMANCE, "large", f"{environment_line(table)}.\n\n{shown}")
    print(shown)


if __name__ == "__main__":
    main()
