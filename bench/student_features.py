"""What extracting the experts' features costs, beside the same experts' forward passes that show nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from bench.measure import DEVICE, OURS, Call, Comparison
from moe_sampler.kernels import philox_normal
from moe_sampler.tinyflux.features.extraction import T_BUCKETS, ExpertFeatures

SUITE = "expert features"
TEXT = 32

SIZES = {
    # The demo experts' shape, and a Stable Diffusion 1.5 of a quarter of its width.
    "demo experts, 16×16": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 128),
        "layers_per_block": 1,
        "cross_attention_dim": 128,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "SD1.5, quarter width, 32×32": {
        "sample_size": 32,
        "block_out_channels": (80, 160, 320, 320),
        "cross_attention_dim": 192,
        "attention_head_dim": 8,
        "norm_num_groups": 16,
    },
    "SD1.5, 64×64": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
}


def new_unet(name: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SIZES[name]).eval()
    torch.nn.Module.to(unet, DEVICE)
    return unet.half() if DEVICE == "cuda" else unet


class _MatricesKept(AttnProcessor):
    """Attention as hooks on matrices need it: every matrix materialised and kept until the pass is over."""

    def __init__(self, kept: list[Tensor]) -> None:
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        if encoder_hidden_states is None:
            q, k = attn.to_q(hidden_states), attn.to_k(hidden_states)
            self.kept.append(attn.get_attention_scores(*(attn.head_to_batch_dim(x) for x in (q, k))))
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def _comparison(name: str, experts: tuple[str, ...], batch: int, *, slow: bool, kept: bool) -> Comparison:
    def inputs() -> tuple[UNet2DConditionModel, Tensor, Tensor]:
        unet = new_unet(name)
        side = unet.config["sample_size"]
        x0 = philox_normal((batch, 4, side, side), range(batch)).to(DEVICE)
        embeds = torch.zeros(batch, TEXT, unet.config["cross_attention_dim"], device=DEVICE)
        return unet, x0, embeds

    def ours() -> Call:
        unet, x0, embeds = inputs()
        sol, lune = (unet if name in experts else None for name in ("sol", "lune"))
        features = ExpertFeatures(sol=sol, lune=lune)
        return lambda: features(x0, prompt_embeds=embeds, seeds=range(batch))

    def passes(prepare: Callable[[UNet2DConditionModel], list] = lambda unet: []) -> Callable[[], Call]:
        def make() -> Call:
            unet, x0, embeds = inputs()
            kept = prepare(unet)
            x, states = x0.to(unet.dtype), embeds.to(unet.dtype)
            timesteps = [torch.tensor(1000 * t, device=DEVICE) for t in T_BUCKETS]

            @torch.no_grad()
            def call() -> None:
                for timestep in timesteps:
                    for _ in experts:
                        unet(x, timestep, states, return_dict=False)
                        kept.clear()

            return call

        return make

    def keep(unet: UNet2DConditionModel) -> list[Tensor]:
        matrices: list[Tensor] = []
        unet.set_attn_processor(_MatricesKept(matrices))
        return matrices

    case = {"experts": " + ".join(experts), "model": name, "batch": str(batch)}
    providers = {OURS: ours, "forward passes alone": passes()}
    if kept:
        providers["forward passes, matrices kept"] = passes(keep)
    return Comparison(SUITE, case, providers, memory=True, slow=slow)


def comparisons() -> Iterator[Comparison]:
    """Ten buckets of a batch. Only Sol needs attention; Lune's pass ends at the mid block."""
    small, quarter, whole = SIZES
    for experts in (("sol", "lune"), ("sol",), ("lune",)):
        yield _comparison(small, experts, 8, slow=False, kept=False)
    yield _comparison(quarter, ("sol", "lune"), 1, slow=True, kept=False)
    yield _comparison(quarter, ("sol",), 1, slow=True, kept=True)
    if DEVICE == "cuda":
        yield _comparison(whole, ("sol", "lune"), 4, slow=True, kept=False)
        yield _comparison(whole, ("sol",), 4, slow=True, kept=True)
