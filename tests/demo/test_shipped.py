"""The experts that ship: complete, small, fp16, strictly loadable, and they do what they were trained for."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from moe_sampler.demo import experts_path, known_words
from moe_sampler.demo.autoencoder import psnr, to_model
from moe_sampler.demo.captions import EXAMPLE_PROMPTS, caption
from moe_sampler.demo.data import HELD_OUT_FIRST
from moe_sampler.demo.export import COMPONENTS
from moe_sampler.demo.scenes import draw_scene, render
from moe_sampler.demo.text import tokenize
from moe_sampler.demo.tokenizer import MAX_LENGTH, write_tokenizer
from moe_sampler.sampling.paths import FlowPath, VPPath

FOLDER = experts_path()
MODELS = {
    "vae": AutoencoderTiny,
    "text_encoder": CLIPTextModel,
    "unet_sol": UNet2DConditionModel,
    "unet_lune": UNet2DConditionModel,
}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    loaded = {}
    for name, model_class in MODELS.items():
        model, info = model_class.from_pretrained(FOLDER / name, output_loading_info=True)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not info[problem], (name, problem)
        loaded[name] = model.float().eval()
    return loaded


def test_the_folder_is_complete_and_small():
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "HybridPipeline"
    for name, source in COMPONENTS.items():
        assert index[name] == list(source)
        assert (FOLDER / name).is_dir()
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 36_000_000
    assert not [file for file in FOLDER.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_every_weight_is_fp16_and_finite():
    for path in FOLDER.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                assert not tensor.is_floating_point() or tensor.dtype == torch.float16, (path, key)
                assert torch.isfinite(tensor.float()).all(), (path, key)


def test_schedulers_say_what_the_experts_were_trained_on():
    sol = DDPMScheduler.from_pretrained(FOLDER / "scheduler_sol")
    lune = FlowMatchEulerDiscreteScheduler.from_pretrained(FOLDER / "scheduler_lune")
    assert (sol.config.prediction_type, sol.config.beta_schedule) == ("v_prediction", "linear")
    assert not sol.config.clip_sample and sol.config.timestep_spacing == "trailing"
    np.testing.assert_allclose(sol.alphas_cumprod.double().sqrt().numpy(), VPPath.linear().alphas, rtol=1e-4)
    assert lune.config.shift == 2.0


def test_the_tokenizer_makes_each_known_word_one_token(tokenizer):
    for word in known_words():
        assert len(tokenizer(word).input_ids) == 3, word
    ids = tokenizer("A castle with two towers, at dusk").input_ids
    said = tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",").strip()
    assert said == "a castle with two towers, at dusk"


def test_strangers_do_no_harm(tokenizer):
    """Unknown words, other alphabets and emoji become bytes, never an error or an unknown token."""
    ids = tokenizer("zöological ドラゴン 🐉").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]


def test_the_tokenizer_is_the_one_the_code_writes(tokenizer, tmp_path):
    write_tokenizer(tmp_path)
    assert CLIPTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert tokenizer.model_max_length == MAX_LENGTH


def test_the_autoencoder_reconstructs_fresh_renders(models):
    vae = models["vae"]
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 4
    scenes = [draw_scene(HELD_OUT_FIRST + 5000 + i) for i in range(24)]
    for structure, bound in ((False, 26.0), (True, 29.0)):
        images = to_model(np.stack([render(scene, structure) for scene in scenes]))
        with torch.no_grad():
            # Stable Diffusion pipelines' convention: scaled on the way in, unscaled on the way out.
            latents = vae.encode(images).latents * vae.config.scaling_factor
            output = vae.decode(latents / vae.config.scaling_factor).sample
        assert latents.shape == (24, 4, 16, 16)
        assert 0.8 < latents.std() < 1.2
        errors = (output - images).square().mean((1, 2, 3))
        assert psnr(errors).mean() > bound


def _states(models, tokenizer, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return models["text_encoder"](tokenize(tokenizer, texts))[0]


def test_text_states_tell_prompts_apart(models, tokenizer):
    states = _states(models, tokenizer, ["", *EXAMPLE_PROMPTS])
    flat = states.flatten(1)
    distances = torch.cdist(flat, flat) + 1e9 * torch.eye(len(flat))
    assert distances.min() > 1.0


def test_both_experts_denoise_and_listen_to_the_prompt(models, tokenizer):
    """At s = 0.5 the x0 error is far below the trivial guess's, and the right caption helps at high noise."""
    vae = models["vae"]
    rng = np.random.default_rng(1)
    scenes = [draw_scene(HELD_OUT_FIRST + 6000 + i) for i in range(16)]
    right = _states(models, tokenizer, [caption(scene, rng, keep=1.0) for scene in scenes])
    wrong = right.roll(5, dims=0)
    with torch.no_grad():
        x0 = vae.encode(to_model(np.stack([render(s) for s in scenes]))).latents * vae.config.scaling_factor
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))

        def errors(s: float, states: torch.Tensor) -> tuple[float, float]:
            flow, vp = FlowPath(), VPPath.linear()
            timestep = vp.nearest_timestep(s)
            level = vp.level(timestep)
            x = level.alpha * x0 + level.sigma * noise
            v = models["unet_sol"](x, torch.tensor(timestep), states).sample
            sol = (level.alpha * x - level.sigma * v - x0).square().mean()
            x = (1 - level.noise) * x0 + level.noise * noise
            u = models["unet_lune"](x, torch.tensor(flow.timestep(level)), states).sample
            return float(sol), float((x - level.noise * u - x0).square().mean())

        for middle in errors(0.5, right):
            assert middle < 0.25
        for helped, misled in zip(errors(0.9, right), errors(0.9, wrong), strict=True):
            assert helped < 0.8 * misled
