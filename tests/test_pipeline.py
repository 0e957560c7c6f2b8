"""HybridPipeline on the demo experts."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_sampler import Crossfade, HybridPipeline
from moe_sampler.checkpoints import CheckpointError
from moe_sampler.demo import experts_path
from moe_sampler.kernels import philox_normal

PROMPT = "a castle with two towers, at dusk"
QUICK = dict(num_inference_steps=4, output_type="latent")


def test_is_a_diffusers_pipeline(demo_pipeline):
    assert isinstance(demo_pipeline, diffusers.DiffusionPipeline)
    assert demo_pipeline.vae_scale_factor == 4
    output = demo_pipeline(PROMPT, seed=0, num_inference_steps=4)
    assert output.images[0].size == (64, 64) and output.seeds == [0]
    assert output.plan.experts == ("sol", "lune")
    assert demo_pipeline(PROMPT, seed=0, num_inference_steps=4, return_dict=False)[0][0] == output.images[0]


def test_lune_alone_is_what_diffusers_parts_make_by_hand(demo_pipeline):
    """The same components, diffusers' scheduler and guidance written out, from the same noise."""
    pipe, steps, scale = demo_pipeline, 6, 2.0
    mine = pipe(
        PROMPT, seed=5, expert="lune", num_inference_steps=steps, guidance_scale=scale, output_type="latent"
    ).images
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler_lune.config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    tokens = pipe.tokenizer(["", PROMPT], padding="max_length", truncation=True, return_tensors="pt")
    x = philox_normal((1, 4, 16, 16), torch.tensor([5]), 0, stream=1)
    with torch.no_grad():
        embeds = pipe.text_encoder(tokens.input_ids)[0]
        for t in scheduler.timesteps:
            uncond, cond = pipe.unet_lune(torch.cat([x, x]), t, encoder_hidden_states=embeds).sample.chunk(2)
            x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
    torch.testing.assert_close(mine, x, atol=1e-4, rtol=0)


def test_same_seed_alone_and_in_a_batch(demo_pipeline):
    alone = demo_pipeline(PROMPT, seed=8, **QUICK).images
    batch = demo_pipeline([PROMPT, "a portrait"], seed=7, num_images_per_prompt=2, **QUICK)
    assert batch.seeds == [7, 8, 9, 10] and batch.images.shape[0] == 4
    # The sampler's part is equal to the bit; a convolution may round differently in another batch.
    torch.testing.assert_close(batch.images[1:2], alone, atol=2e-4, rtol=0)
    assert (batch.images[0] - batch.images[1]).abs().max() > 0.1


def test_settings_act(demo_pipeline):
    def run(**settings):
        return demo_pipeline(PROMPT, seed=1, **{**QUICK, **settings}).images

    base = run()
    assert torch.equal(base, run())
    for settings in (
        dict(expert="sol"),
        dict(expert="lune"),
        dict(handoff=0.4),
        dict(router=Crossfade("sol", "lune", 0.9, 0.4)),
        dict(num_inference_steps=5),
        dict(num_inference_steps=None, sol_steps=2, lune_steps=2),
        dict(guidance_scale=1.0),
        dict(sol_guidance=9.0),
        dict(lune_guidance=9.0),
        dict(negative_prompt="a city street at night"),
        dict(shift=5.0),
        dict(solver="dpmpp_2m"),
        dict(solver={"sol": "ddim"}),
        dict(solver={"sol": "ddim"}, eta=0.5),
    ):
        assert not torch.equal(base, run(**settings)), settings
    assert torch.equal(run(guidance_scale=3.0), run(sol_guidance=3.0, lune_guidance=3.0))


def test_generators_latents_and_embeds(demo_pipeline):
    def seeded():
        return torch.Generator().manual_seed(4)

    first = demo_pipeline(PROMPT, generator=seeded(), **QUICK)
    assert first.seeds is None
    assert torch.equal(first.images, demo_pipeline(PROMPT, generator=seeded(), **QUICK).images)
    latents = torch.randn(1, 4, 16, 16, generator=seeded())
    embeds, empty = demo_pipeline.encode_prompt(PROMPT), demo_pipeline.encode_prompt("")
    by_embeds = demo_pipeline(
        prompt_embeds=embeds, negative_prompt_embeds=empty, latents=latents, seed=2, **QUICK
    ).images
    assert torch.equal(by_embeds, demo_pipeline(PROMPT, latents=latents, seed=2, **QUICK).images)
    state = torch.random.get_rng_state()
    demo_pipeline(PROMPT, **QUICK)
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator is nobody's business


def test_not_square_and_output_types(demo_pipeline):
    wide = demo_pipeline(PROMPT, seed=0, height=48, width=96, num_inference_steps=2)
    assert wide.images[0].size == (96, 48)
    array = demo_pipeline(PROMPT, seed=0, num_inference_steps=2, output_type="np").images
    tensor = demo_pipeline(PROMPT, seed=0, num_inference_steps=2, output_type="pt").images
    assert array.shape == (1, 64, 64, 3) and array.min() >= 0 and array.max() <= 1
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), array)


def test_callback_on_step_end(demo_pipeline):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, timestep, sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    names = ["latents", "pred_original_sample"]
    images = demo_pipeline(
        PROMPT, seed=0, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names, **QUICK
    ).images
    assert [step for step, _, _ in seen] == [0, 1, 2, 3] and seen[0][1] == 999 and seen[0][2] == names
    assert (images == 0).all()


def test_a_callback_may_change_the_latents_in_place(demo_pipeline):
    def in_place(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"].mul_(0.5)}

    def by_value(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0.5}

    halved = [
        demo_pipeline(PROMPT, seed=0, callback_on_step_end=halve, **QUICK).images
        for halve in (in_place, by_value)
    ]
    assert torch.equal(*halved)


def test_progress_bar_says_who_is_at_work(demo_pipeline, capsys):
    demo_pipeline.set_progress_bar_config(disable=False, mininterval=0)
    demo_pipeline(PROMPT, seed=0, num_inference_steps=4)
    demo_pipeline.set_progress_bar_config(disable=True)
    shown = capsys.readouterr().err
    assert "Sol" in shown and "Lune" in shown and shown.index("Sol") < shown.index("Lune")


def test_saved_folder_reads_back_to_the_same_bits(demo_pipeline, tmp_path):
    demo_pipeline.save_pretrained(tmp_path)
    again = HybridPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    settings = ("handoff", "num_inference_steps", "sol_guidance", "lune_guidance")
    assert [again.config[key] for key in settings] == [demo_pipeline.config[key] for key in settings]
    assert torch.equal(demo_pipeline(PROMPT, seed=3, **QUICK).images, again(PROMPT, seed=3, **QUICK).images)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(experts_path(), tmp_path / "model")


def tamper(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model_index.json").unlink(), "no model_index.json"),
        (lambda d: (d / "model_index.json").write_text("{"), "cannot be read"),
        (lambda d: shutil.rmtree(d / "unet_lune"), "no unet_lune/"),
        (lambda d: (d / "unet_sol" / "config.json").unlink(), "unet_sol cannot be loaded"),
        (
            lambda d: (d / "unet_sol" / "diffusion_pytorch_model.safetensors").unlink(),
            "unet_sol cannot be loaded",
        ),
        (
            lambda d: (d / "unet_sol" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x80pickle"),
            "unet_sol cannot be loaded",
        ),
        (
            lambda d: tamper(
                d / "unet_lune" / "diffusion_pytorch_model.safetensors", lambda t: t.pop("conv_in.weight")
            ),
            "missing: conv_in.weight",
        ),
        (
            lambda d: tamper(
                d / "unet_lune" / "diffusion_pytorch_model.safetensors",
                lambda t: t.update({"stray.weight": torch.zeros(1)}),
            ),
            "unexpected: stray.weight",
        ),
        (
            lambda d: tamper(
                d / "unet_lune" / "diffusion_pytorch_model.safetensors",
                lambda t: t.update({"conv_in.bias": torch.zeros(3)}),
            ),
            "conv_in.bias",
        ),
        (
            lambda d: tamper(
                d / "text_encoder" / "model.safetensors",
                lambda t: t.pop(next(k for k in t if "final_layer_norm.bias" in k)),
            ),
            "final_layer_norm.bias",
        ),
    ],
)
def test_loading_is_strict(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        HybridPipeline.from_pretrained(folder)


def test_a_truncated_file_is_an_error(folder):
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="vae cannot be loaded"):
        HybridPipeline.from_pretrained(folder)


def test_the_folder_is_plain_json_and_safetensors():
    index = json.loads((experts_path() / "model_index.json").read_text())
    assert index["_class_name"] == "HybridPipeline"
    names = {file.suffix for file in experts_path().rglob("*") if file.is_file()}
    assert names <= {".json", ".safetensors", ".txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt=None), "either prompt or prompt_embeds"),
        (dict(prompt=3), "string or a non-empty list"),
        (dict(prompt=[]), "string or a non-empty list"),
        (dict(height=60), "multiple of 16"),
        (dict(width=0.5), "multiple of 16"),
        (dict(num_images_per_prompt=0), "at least 1"),
        (dict(output_type="jpg"), "unknown output_type"),
        (dict(negative_prompt=["a", "b"]), "as many negative prompts"),
        (dict(handoff=1.0), "strictly between"),
        (dict(expert="luna"), "unknown expert"),
        (dict(expert="sol", handoff=0.5), "no handoff"),
        (dict(solver="magic"), "unknown solver"),
        (dict(solver={"luna": "ddpm"}), "solver names luna"),
        (dict(num_inference_steps=0), "at least 1"),
        (dict(sol_steps=3), "come together"),
        (dict(sol_steps=3, lune_steps=3, num_inference_steps=6), "not both"),
        (dict(seed=[1, 2]), "1 images need 1 seeds"),
        (dict(seed=1, generator=torch.Generator()), "seed or generator"),
        (dict(latents=torch.zeros(1, 4, 8, 8)), "must have shape"),
        (dict(callback_on_step_end_tensor_inputs=["x"]), "may name"),
    ],
)
def test_wrong_input_is_refused_before_any_work(demo_pipeline, monkeypatch, arguments, message):
    monkeypatch.setattr(demo_pipeline, "encode_prompt", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        demo_pipeline(**{"prompt": PROMPT, **arguments})


def test_a_long_prompt_is_cut_with_a_warning(demo_pipeline, caplog):
    diffusers.utils.logging.enable_propagation()
    embeds = demo_pipeline.encode_prompt("castle " * 60 + "street")
    diffusers.utils.logging.disable_propagation()
    assert embeds.shape[1] == demo_pipeline.tokenizer.model_max_length
    assert "street" in caplog.text and "cut off" in caplog.text
