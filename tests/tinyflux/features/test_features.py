"""What the experts teach, against diffusers' own attention scores and schedulers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from bench.counting import peak_memory
from moe_sampler import HybridPipeline
from moe_sampler.architectures.unet import UNET
from moe_sampler.demo.autoencoder import to_model
from moe_sampler.demo.data import HELD_OUT_FIRST
from moe_sampler.demo.scenes import draw_scene, render
from moe_sampler.kernels import philox_normal
from moe_sampler.sampling.paths import FlowPath
from moe_sampler.tinyflux.features.capture import CaptureError
from moe_sampler.tinyflux.features.extraction import T_BUCKETS, ExpertFeatures

PROMPTS = ["a castle by a lake", "a portrait", "a city street at night", ""]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To the scale of the features, which are large in experts that were trained for long."""
    scale = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def latents(demo_pipeline) -> torch.Tensor:
    scenes = np.stack([render(draw_scene(HELD_OUT_FIRST + 700 + i)) for i in range(4)])
    with torch.no_grad():
        return demo_pipeline.vae.encode(to_model(scenes)).latents * demo_pipeline.vae.config.scaling_factor


@pytest.fixture(scope="module")
def demo(demo_pipeline) -> ExpertFeatures:
    return ExpertFeatures.from_pipeline(demo_pipeline)


def test_a_pipelines_experts_have_the_paths_of_their_schedulers(demo_pipeline):
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    told = DDPMScheduler(**betas, prediction_type="v_prediction", clip_sample=False)
    pipe = HybridPipeline(**{**demo_pipeline.components, "scheduler_sol": told}, experts=["sol", "lune"])
    found = ExpertFeatures.from_pipeline(pipe)
    assert found.sol_path.alphas == pytest.approx(told.alphas_cumprod.double().sqrt().numpy(), rel=1e-5)
    assert found.lune_path == ExpertFeatures.from_pipeline(demo_pipeline).lune_path == FlowPath()
    assert found.teachers == ("sol", "lune") and found.encode_prompt(["a castle"]).shape[0] == 1
    assert ExpertFeatures.from_pipeline(pipe, ("lune",)).teachers == ("lune",)


class ScoresProcessor(AttnProcessor):
    """diffusers' plain attention, which also keeps the matrices of self-attention."""

    def __init__(self, found: list, sizes: dict[int, tuple[int, int]]) -> None:
        self.found, self.sizes = found, sizes

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
        if not attn.is_cross_attention:
            x = hidden_states
            if x.ndim == 4:
                x = x.flatten(2).transpose(1, 2)
            if attn.group_norm is not None:
                x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
            q, k = (attn.head_to_batch_dim(project(x)) for project in (attn.to_q, attn.to_k))
            scores = attn.get_attention_scores(q, k)
            self.found.append((scores.unflatten(0, (len(x), -1)).mean(1), self.sizes[x.shape[1]]))
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)


def statistics(p: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """DESIGN's definitions on the head-mean matrix [B, N, N], in float64."""
    p, (height, width) = p.double(), size
    tokens = height * width
    places = torch.tensor([(y, x) for y in range(height) for x in range(width)], dtype=torch.float64)
    distance = torch.cdist(places, places)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1).mean(-1) / math.log(tokens)
    locality = 1 - (p * distance).sum(-1).mean(-1) / distance.max()
    received = p.sum(1).view(-1, 1, height, width)
    resized = F.interpolate(received, (8, 8), mode="bilinear", align_corners=False)[:, 0]
    return torch.stack([locality, entropy, 1 - entropy], -1), resized


def expected_sol(unet, x, timestep, embeds) -> tuple[torch.Tensor, torch.Tensor]:
    found: list = []
    height, width = x.shape[-2:]
    sizes = {}
    for _ in range(5):
        sizes[height * width] = (height, width)
        height, width = -(-height // 2), -(-width // 2)
    before = unet.attn_processors
    unet.set_attn_processor(ScoresProcessor(found, sizes))
    with torch.no_grad():
        unet(x, torch.tensor(timestep), embeds)
    unet.set_attn_processor(before)
    assert len(found) == len(UNET.self_attention_layers(unet))
    stats, maps = zip(*(statistics(*layer) for layer in found), strict=True)
    spatial = torch.stack(maps).mean(0)
    return torch.stack(stats).mean(0).float(), (spatial / spatial.sum((-2, -1), keepdim=True)).float()


def expected_lune(unet, x, timestep, embeds) -> torch.Tensor:
    found = []
    handle = unet.mid_block.register_forward_hook(lambda _module, _args, output: found.append(output))
    with torch.no_grad():
        unet(x, torch.tensor(timestep), embeds)
    handle.remove()
    return found[0].mean((2, 3))


def test_the_buckets():
    assert pytest.approx(np.linspace(0.05, 0.95, 10), abs=1e-12) == T_BUCKETS


def test_features_are_those_of_each_experts_own_path(demo, demo_pipeline, latents):
    times = (0.0, 0.05, 0.31, 0.5, 0.95, 1.0)
    features = demo(latents, PROMPTS, seeds=[5, 6, 7, 8], t=times)
    assert [tuple(f.shape) for f in features] == [(4, 6, 160), (4, 6, 3), (4, 6, 8, 8)]
    assert {f.dtype for f in features} == {torch.float32}
    noise = philox_normal(latents.shape, [5, 6, 7, 8])
    with torch.no_grad():
        embeds = demo_pipeline.encode_texts(PROMPTS)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    # Signal to noise of every timestep, beside the flow's (1 - s) / s = t / (1 - t).
    snr = (scheduler.alphas_cumprod.double() / (1 - scheduler.alphas_cumprod.double())).sqrt().log()
    for i, t in enumerate(times):
        s = 1 - t
        x = (1 - s) * latents + s * noise
        assert_near(features.lune[:, i], expected_lune(demo_pipeline.unet_lune, x, 1000 * s, embeds))
        wanted = math.log(max(t, 1e-9) / max(s, 1e-9))
        timestep = int((snr - wanted).abs().argmin())
        x = scheduler.add_noise(latents, noise, torch.tensor([timestep] * 4))
        stats, spatial = expected_sol(demo_pipeline.unet_sol, x, timestep, embeds)
        assert_near(features.sol_stats[:, i], stats)
        assert_near(features.sol_maps[:, i], spatial)
    assert timestep == 0
    torch.testing.assert_close(features.sol_maps.sum((-2, -1)), torch.ones(4, 6))


def spread(features: torch.Tensor) -> np.ndarray:
    """[T]: how far samples of a batch lie from their mean."""
    flat = features.flatten(2)
    return (flat - flat.mean(0)).norm(dim=-1).mean(0).numpy()


@pytest.mark.parametrize("name", ["lune", "sol_stats", "sol_maps"])
def test_data_end_knows_the_image_and_noise_end_the_noise(demo, latents, name):
    """Fails for features of pure noise, and for a clock that runs the wrong way round."""
    times = (0.02, 0.98)
    same_prompt = ["a picture"] * 4
    of_images = spread(getattr(demo(latents, same_prompt, seeds=[1] * 4, t=times), name))
    one = latents[:1].expand(4, -1, -1, -1)
    of_noises = spread(getattr(demo(one, same_prompt, seeds=[1, 2, 3, 4], t=times), name))
    assert of_images[1] > 4 * of_noises[1]
    assert of_noises[0] > 1.5 * of_images[0]


def test_upstreams_convention_is_reproduced_and_sees_no_image(demo_pipeline, latents):
    old = ExpertFeatures.from_pipeline(demo_pipeline, convention="tiny-flux-v4")
    times = (0.25, 0.75)
    features = old(latents, PROMPTS, seeds=[5, 6, 7, 8], t=times)
    with torch.no_grad():
        embeds = demo_pipeline.encode_texts(PROMPTS)
    for i, t in enumerate(times):
        noise = philox_normal(latents.shape, [5, 6, 7, 8], step=i)
        lune = expected_lune(demo_pipeline.unet_lune, noise, 1000 * t, embeds)
        stats, spatial = expected_sol(demo_pipeline.unet_sol, noise, 1000 * t, embeds)
        assert_near(features.lune[:, i], lune)
        assert_near(features.sol_stats[:, i], stats)
        assert_near(features.sol_maps[:, i], spatial)
    assert torch.equal(features.lune, old(-latents, PROMPTS, seeds=[5, 6, 7, 8], t=times).lune)


def test_one_noise_serves_all_times_and_belongs_to_the_sample(demo, latents):
    whole = demo(latents, PROMPTS, seeds=[5, 6, 7, 8], t=(0.1, 0.6, 0.8))
    for part, all_of_it in zip(demo(latents, PROMPTS, seeds=[5, 6, 7, 8], t=(0.6,)), whole, strict=True):
        assert torch.equal(part[:, 0], all_of_it[:, 1])
    alone = demo(latents[2:3], PROMPTS[2:3], seeds=torch.tensor([7]), t=(0.1, 0.6, 0.8))
    for part, all_of_it in zip(alone, whole, strict=True):
        assert_near(part, all_of_it[2:3])
    other = demo(latents, PROMPTS, seeds=[5, 6, 9, 8], t=(0.1,))
    assert not torch.allclose(other.lune[2], whole.lune[2, :1], atol=1e-3)


def small_unet(**settings) -> UNet2DConditionModel:
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**defaults, **settings}).eval()


KINDS = {
    "SD1.5's kind": {},
    "attention at the bottom only": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "in the mid block only": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    },
    "without text": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
    "linear projections, two deep, SDXL's kind": {
        "use_linear_projection": True,
        "transformer_layers_per_block": 2,
        "attention_head_dim": (2, 4),
    },
    "upcast attention": {"upcast_attention": True},
}


@pytest.mark.parametrize("size", [(8, 8), (6, 12), (7, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_unet_and_any_size(kind, size):
    unet = small_unet(**KINDS[kind])
    x0 = philox_normal((2, 4, *size), [1, 2])
    embeds = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    features = ExpertFeatures(sol=unet, lune=unet)(x0, prompt_embeds=embeds, seeds=[3, 4], t=(0.5,))
    noise = philox_normal(x0.shape, [3, 4])
    lune = expected_lune(unet, 0.5 * x0 + 0.5 * noise, 500.0, embeds)
    torch.testing.assert_close(features.lune[:, 0], lune, **TOLERANCE)
    scheduler = DDPMScheduler(beta_schedule="linear")
    abar = scheduler.alphas_cumprod
    timestep = int(((abar / (1 - abar)).log()).abs().argmin())
    x = scheduler.add_noise(x0, noise, torch.tensor([timestep] * 2))
    stats, spatial = expected_sol(unet, x, timestep, embeds)
    torch.testing.assert_close(features.sol_stats[:, 0], stats, **TOLERANCE)
    torch.testing.assert_close(features.sol_maps[:, 0], spatial, **TOLERANCE)


def test_fused_projections_are_captured_too():
    unet, embeds = small_unet(), torch.zeros(1, 5, 24)
    x0 = philox_normal((1, 4, 8, 8), [1])
    plain = ExpertFeatures(sol=unet)(x0, prompt_embeds=embeds, seeds=[3], t=(0.5,))
    unet.fuse_qkv_projections()
    fused = ExpertFeatures(sol=unet)(x0, prompt_embeds=embeds, seeds=[3], t=(0.5,))
    torch.testing.assert_close(fused.sol_maps, plain.sol_maps, **TOLERANCE)
    assert fused.lune is None


def hooks(unet) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


def test_nothing_stays_behind(demo, demo_pipeline, latents):
    unets = (demo_pipeline.unet_sol, demo_pipeline.unet_lune)
    before = [(dict(u.attn_processors), list(u._modules.values()), hooks(u)) for u in unets]
    demo(latents, PROMPTS, seeds=[1] * 4, t=(0.5,))
    with pytest.raises(RuntimeError):
        demo(latents, prompt_embeds=torch.zeros(4, 5, 3), seeds=[1] * 4, t=(0.5,))
    assert before == [(dict(u.attn_processors), list(u._modules.values()), hooks(u)) for u in unets]
    assert before[0][2] == before[1][2] == 0


def test_what_is_not_needed_is_not_computed(demo, demo_pipeline, latents):
    ran = []
    parts = {
        "lune's first up block": demo_pipeline.unet_lune.up_blocks[0],
        "lune's output": demo_pipeline.unet_lune.conv_out,
        "sol's last up block": demo_pipeline.unet_sol.up_blocks[-1],
        "sol's output": demo_pipeline.unet_sol.conv_out,
        "sol's attention above": demo_pipeline.unet_sol.up_blocks[1],
    }
    handles = [m.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, m in parts.items()]
    demo(latents, PROMPTS, seeds=[1] * 4, t=(0.5,))
    for handle in handles:
        handle.remove()
    assert ran == ["sol's attention above"]


class BypassProcessor(AttnProcessor):
    """Reads the projections' weights instead of calling them."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        q = F.linear(hidden_states, attn.to_q.weight)
        return attn.to_out[0](F.scaled_dot_product_attention(q, q, q))


def test_a_layer_that_cannot_be_captured_is_an_error_that_names_it():
    unet = small_unet()
    name = next(iter(UNET.self_attention_layers(unet)))
    unet.get_submodule(name).processor = BypassProcessor()
    with pytest.raises(CaptureError, match=name):
        ExpertFeatures(sol=unet)(
            torch.zeros(1, 4, 8, 8), prompt_embeds=torch.zeros(1, 5, 24), seeds=[0], t=(0.5,)
        )
    assert hooks(unet) == 0


def test_half_precision_models_give_nearly_the_same():
    x0, embeds = philox_normal((2, 4, 8, 8), [1, 2]), torch.zeros(2, 5, 24)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        unet = small_unet().to(dtype)
        results.append(ExpertFeatures(sol=unet, lune=unet)(x0, prompt_embeds=embeds, seeds=[3, 4], t=(0.5,)))
    for full, half, atol in zip(*results, (0.01, 2e-4, 1.5e-4), strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0, atol=atol)
    # The tolerances tell these features from none: from zeros, from a flat map, from the other sample's.
    lune, stats, maps = results[0]
    assert lune.abs().max() > 0.5 and (lune[0] - lune[1]).abs().max() > 0.05
    assert stats[..., 2].min() > 2e-3 and (maps - 1 / 64).abs().max() > 1.5e-3


def test_memory_does_not_grow_with_the_layers():
    """Beyond what the model itself needs: its statistics are O(tokens) a layer, its matrices O(tokens²)."""
    side, batch = 24, 2
    x0, embeds = philox_normal((batch, 4, side, side), [1, 2]), torch.zeros(batch, 5, 24)
    excess = []
    for layers in (1, 4):
        unet = small_unet(layers_per_block=layers)

        @torch.no_grad()
        def forward(unet=unet):
            unet(x0, torch.tensor(500), embeds)

        features = ExpertFeatures(sol=unet)
        call = lambda features=features: features(x0, prompt_embeds=embeds, seeds=[1, 2], t=(0.5,))  # noqa: E731
        excess.append(peak_memory(call, "cpu") - peak_memory(forward, "cpu"))
    one_matrix = 4 * batch * side**4
    assert excess[1] < excess[0] + one_matrix / 4


def test_inputs_are_checked_before_any_work(demo_pipeline, latents, demo):
    unet = small_unet()
    with pytest.raises(ValueError, match="sol, lune or both"):
        ExpertFeatures()
    with pytest.raises(ValueError, match="training mode"):
        ExpertFeatures(sol=small_unet().train())
    with pytest.raises(ValueError, match="no mid block"):
        ExpertFeatures(lune=small_unet(mid_block_type=None))
    with pytest.raises(ValueError, match="convention"):
        ExpertFeatures(sol=unet, convention="upstream")
    with pytest.raises(TypeError, match="not wrapped"):
        ExpertFeatures(sol=torch.nn.Sequential(unet))
    with pytest.raises(ValueError, match="no self-attention"):
        kind = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        ExpertFeatures(sol=small_unet(mid_block_type="UNetMidBlock2D", **kind, only_cross_attention=True))
    with pytest.raises(ValueError, match="teachers"):
        ExpertFeatures.from_pipeline(demo_pipeline, ("sol", "david"))
    with pytest.raises(ValueError, match="between 0"):
        demo(latents, PROMPTS, seeds=[1] * 4, t=(1.5,))
    with pytest.raises(ValueError, match="float32"):
        demo(latents.half(), PROMPTS, seeds=[1] * 4)
    with pytest.raises(ValueError, match="as many"):
        demo(latents, PROMPTS[:2], seeds=[1] * 4)
    with pytest.raises(ValueError, match="either prompt"):
        demo(latents, seeds=[1] * 4)
    with pytest.raises(ValueError, match="no text encoder"):
        ExpertFeatures(sol=unet)(latents, PROMPTS, seeds=[1] * 4)
