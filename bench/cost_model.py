"""A cost model on paper: a million images, and a hundred million cached training samples, on N GPUs.

    python -m bench.cost_model

Arithmetic is counted by torch on the models' shapes (Stable Diffusion 1.5's sizes, on the meta device); bytes
are the fused step's; peaks are the data sheets'. Nothing is measured. Prints the tables and renews them in
docs/PERFORMANCE.md.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bench.cases import cases
from bench.pages import PERFORMANCE, renew_page
from bench.report import markdown
from bench.roofline import DEVICES, Device

UTILISATION = 0.4
"""Share of the dense half-precision peak that a well-run UNet reaches."""

LAUNCH = 3e-6
"""Seconds from one kernel's launch to the next one's, without a CUDA graph."""

STEPS, BUCKETS, BATCH = 20, 10, 16
IMAGES, SAMPLES = 1_000_000, 100_000_000
GPUS = (1, 8, 64)
LATENT, PIXELS = (1, 4, 64, 64), (1, 3, 512, 512)
# Self-attention of Stable Diffusion 1.5's UNet at 64×64 latents: (layers, tokens, head size), 8 heads each.
ATTENTION = ((5, 4096, 40), (5, 1024, 80), (5, 256, 160), (1, 64, 160))


def _count(call) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@cache
def flops() -> dict[str, float]:
    """Floating-point operations of one pass of each model over one sample."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        blocks = 4
        # A dict, because diffusers annotates these tuples as holding one item each.
        shape: dict[str, Any] = {
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "down_block_types": ("DownEncoderBlock2D",) * blocks,
            "up_block_types": ("UpDecoderBlock2D",) * blocks,
        }
        vae = AutoencoderKL(**shape)
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
        t5 = T5EncoderModel(
            T5Config(d_model=768, d_ff=2048, num_heads=12, num_layers=12, feed_forward_proj="gated-gelu")
        )
        return {
            "unet": _count(lambda: unet(torch.empty(LATENT), torch.tensor(1.0), torch.empty(1, 77, 768))),
            # Annotated as a FloatTensor, the legacy class that no tensor of another dtype is an instance of.
            "decoder": _count(lambda: vae.decode(torch.empty(LATENT))),  # pyright: ignore[reportArgumentType]
            "encoder": _count(lambda: vae.encode(torch.empty(PIXELS))),
            "clip": _count(lambda: clip(torch.ones(1, 77, dtype=torch.long))),
            "t5": _count(lambda: t5(torch.ones(1, 128, dtype=torch.long))),
        }


def step_bytes() -> float:
    """Bytes of the guided fused step with fresh noise and 16-bit models, of one 64×64 latent."""
    case = next(c for c in cases() if "noise in the kernel" in c.variant and c.dtype == torch.bfloat16)
    built = case.build(LATENT, "meta")
    return float(sum(t.nbytes for t in (*built.read, *built.written)))


def statistics_seconds(device: Device) -> float:
    """Both streaming passes over all self-attention layers of one sample: products or exponentials."""
    products = exps = 0.0
    for layers, tokens, size in ATTENTION:
        products += layers * 2 * 2 * 8 * tokens**2 * size
        exps += layers * 2 * 8 * tokens**2
    return max(products / device.half, exps / device.exp_rate())


def _hours(seconds: float, gpus: int) -> str:
    hours = seconds / gpus / 3600
    return f"{hours:,.0f} h" if hours < 100 else f"{hours / 24:,.0f} d"


def image_rows() -> list[dict[str, object]]:
    """What an image costs, batch 1 and batched, and a million of them."""
    count = flops()
    work = STEPS * 2 * count["unet"] + count["decoder"] + 2 * count["clip"]
    rows = []
    for device in DEVICES:
        model = work / (UTILISATION * device.half)
        memory = STEPS * step_bytes() / device.bandwidth
        rows.append(
            {
                "device": device.name,
                "TFLOP an image": f"{work / 1e12:.1f}",
                "models, ms an image": f"{model * 1e3:.1f}",
                f"steps, µs an image, batch {BATCH}": f"{(memory + STEPS * LAUNCH / BATCH) * 1e6:.1f}",
                "steps, µs an image, alone": f"{(memory + STEPS * LAUNCH) * 1e6:.0f}",
                "share of steps, alone": f"{(memory + STEPS * LAUNCH) / model:.3%}",
                **{f"10⁶ images, {n} GPU{'s' * (n > 1)}": _hours(IMAGES * model, n) for n in GPUS},
            }
        )
    return rows


def cache_rows() -> list[dict[str, object]]:
    """What a cached sample costs in time: its encodings and both experts' features at every bucket."""
    count = flops()
    work = 2 * BUCKETS * count["unet"] + count["encoder"] + count["clip"] + count["t5"]
    rows = []
    for device in DEVICES:
        model = work / (UTILISATION * device.half)
        statistics = BUCKETS * statistics_seconds(device)
        total = model + statistics
        rows.append(
            {
                "device": device.name,
                "TFLOP a sample": f"{work / 1e12:.1f}",
                "models, ms": f"{model * 1e3:.1f}",
                "statistics, ms": f"{statistics * 1e3:.2f}",
                "samples/s a GPU": f"{1 / total:.1f}",
                **{f"10⁸ samples, {n} GPU{'s' * (n > 1)}": _hours(SAMPLES * total, n) for n in GPUS},
                "written, MB/s a GPU": f"{sum(sample_bytes().values()) / total / 1e6:.1f}",
            }
        )
    return rows


def sample_bytes() -> dict[str, int]:
    """Bytes of one cached sample in 16 bits, by what they are."""
    return {
        "latents, 16 × 64 × 64": 2 * 16 * 64 * 64,
        "T5 hidden states, 128 × 768, and mask": 2 * 128 * 768 + 128,
        "CLIP pooled, 768": 2 * 768,
        "Lune's features, 10 × 1280": 2 * BUCKETS * 1280,
        "Sol's statistics and maps, 10 × (3 + 64)": 2 * BUCKETS * 67,
    }


def storage_rows() -> list[dict[str, object]]:
    """Where the bytes of the cache are."""
    parts = sample_bytes()
    parts["together"] = sum(parts.values())
    return [
        {"part": name, "kB a sample": f"{size / 1e3:.1f}", "TB for 10⁸": f"{size * SAMPLES / 1e12:.1f}"}
        for name, size in parts.items()
    ]


def block() -> str:
    counted = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in flops().items())
    return "\n\n".join(
        [
            f"Assumed: models at {UTILISATION:.0%} of the dense half-precision peak, {LAUNCH * 1e6:.0f} µs a "
            f"launch, {STEPS} guided steps. TFLOP a pass: {counted}. A step moves "
            f"{step_bytes() / 1e3:.0f} kB a latent.",
            markdown(image_rows(), image_rows()[0]),
            markdown(cache_rows(), cache_rows()[0]),
            markdown(storage_rows(), storage_rows()[0]),
        ]
    )


def main() -> None:
    text = block()
    renew_page(PERFORMANCE, "cost model", text)
    print(text)


if __name__ == "__main__":
    main()
