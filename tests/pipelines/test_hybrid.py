"""HybridPipeline on the demo experts."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from moe_sampler import Crossfade, HybridPipeline, Spans
from moe_sampler.demo import experts_path
from moe_sampler.errors import CheckpointError
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
    own = dict(expert="lune", solver="euler", num_inference_steps=steps, guidance_scale=scale)
    mine = pipe(PROMPT, seed=5, output_type="latent", **own).images
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


def test_an_experts_own_setting_goes_before_the_one_for_all(demo_pipeline):
    def scales(**settings):
        experts = demo_pipeline.experts(**settings)
        return {expert.name: expert.guidance_scale for expert in experts}

    assert scales(guidance_scale=3.0, sol_guidance=9.0) == {"sol": 9.0, "lune": 3.0}
    assert scales(guidance_scale={"sol": 2.0, "lune": 4.0}, lune_guidance=5.0) == {"sol": 2.0, "lune": 5.0}
    default = demo_pipeline.config["lune_guidance"]
    assert scales(guidance_scale={"sol": 2.0}, sol_guidance=6.0) == {"sol": 6.0, "lune": default}
    images = [
        demo_pipeline(PROMPT, seed=1, **QUICK, **settings).images
        for settings in (
            dict(guidance_scale=3.0, sol_guidance=9.0),
            dict(sol_guidance=9.0, lune_guidance=3.0),
            dict(guidance_scale=3.0),
        )
    ]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_generators_latents_and_embeds(demo_pipeline):
    def seeded():
        return torch.Generator().manual_seed(4)

    first = demo_pipeline(PROMPT, generator=seeded(), **QUICK)
    assert first.seeds is None
    assert torch.equal(first.images, demo_pipeline(PROMPT, generator=seeded(), **QUICK).images)
    latents = torch.randn(1, 4, 16, 16, generator=seeded())
    embeds, empty = demo_pipeline.encode_texts(PROMPT), demo_pipeline.encode_texts("")
    by_embeds = demo_pipeline(
        prompt_embeds=embeds, negative_prompt_embeds=empty, latents=latents, seed=2, **QUICK
    ).images
    assert torch.equal(by_embeds, demo_pipeline(PROMPT, latents=latents, seed=2, **QUICK).images)
    state = torch.random.get_rng_state()
    demo_pipeline(PROMPT, seed=2, **QUICK)  # only a call without a seed draws one from the global generator
    assert torch.equal(state, torch.random.get_rng_state())


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


def test_watching_the_latents_changes_no_bit(demo_pipeline):
    settings = {**QUICK, "output_type": "latent"}
    watched = demo_pipeline(PROMPT, seed=0, callback_on_step_end=lambda *_: {}, **settings).images
    assert torch.equal(watched, demo_pipeline(PROMPT, seed=0, **settings).images)


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


def test_guidance_and_its_negative_prompt_are_each_experts_own(demo_pipeline):
    """By whose steps change: Sol's latents at the handoff, or only Lune's after it."""
    plain = {"solver": {"sol": "ddpm", "lune": "euler"}}

    def run(**settings):
        states = []

        def watch(pipe, step, timestep, tensors):
            states.append(tensors["latents"].clone())
            return {}

        made = demo_pipeline(
            PROMPT, seed=1, callback_on_step_end=watch, **{**QUICK, "handoff": 0.7, **plain, **settings}
        )
        first = next(i for i, step in enumerate(made.plan.steps) if step.calls[0].name == "lune")
        return states[first - 1], made.images

    handed, finished = run()
    night = "a city street at night"
    for settings in (
        dict(negative_prompt={"lune": night}),
        dict(guidance_scale={"lune": 9.0}),
        dict(guidance_rescale={"lune": 0.7}),
        dict(guidance_window={"lune": (0.5, 0.2)}),
        dict(guider={"lune": "apg momentum -0.5"}),
        dict(solver={"sol": "ddpm", "lune": "heun"}),
    ):
        sols, lunes = run(**settings)
        assert torch.equal(sols, handed) and not torch.equal(lunes, finished), settings
    for settings in (dict(negative_prompt={"sol": night}), dict(guidance_scale={"sol": 9.0})):
        sols, lunes = run(**settings)
        assert not torch.equal(sols, handed) and not torch.equal(lunes, finished), settings
    assert torch.equal(run(negative_prompt=night)[1], run(negative_prompt={"sol": night, "lune": night})[1])
    embeds = demo_pipeline.encode_texts(night)
    by_embeds = run(negative_prompt_embeds={"sol": embeds, "lune": embeds})[1]
    assert torch.equal(by_embeds, run(negative_prompt=night)[1])
    # Whoever isn't guided is called once a step, whatever the others do.
    calls = []
    hook = demo_pipeline.unet_sol.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    run(guidance_scale={"sol": 1.0, "lune": 4.0})
    hook.remove()
    assert set(calls) == {1}


def test_lists_of_prompts_and_generators_are_paired(demo_pipeline):
    prompts = [PROMPT, "a portrait"]
    made = demo_pipeline(
        prompts, negative_prompt=["night", ""], num_images_per_prompt=2, seed=[4, 9, 4, 1], **QUICK
    )
    assert made.seeds == [4, 9, 4, 1]
    for i, (prompt, negative) in enumerate(zip(prompts, ("night", ""), strict=True)):
        alone = demo_pipeline(prompt, negative_prompt=negative, seed=4, **QUICK).images
        torch.testing.assert_close(made.images[2 * i : 2 * i + 1], alone, atol=2e-4, rtol=0)

    def generators():
        return [torch.Generator().manual_seed(s) for s in (4, 9, 4, 1)]

    whole = demo_pipeline(prompts, num_images_per_prompt=2, generator=generators(), **QUICK).images
    halves = demo_pipeline(
        prompts, num_images_per_prompt=2, generator=generators(), batch_size=3, **QUICK
    ).images
    torch.testing.assert_close(halves, whole, atol=2e-4, rtol=0)
    last = demo_pipeline("a portrait", generator=generators()[3], **QUICK).images
    torch.testing.assert_close(last, whole[3:], atol=2e-4, rtol=0)


def test_image_to_image_enters_the_plan_at_the_right_expert(demo_pipeline):
    pipe, steps = demo_pipeline, 10
    picture = pipe(PROMPT, seed=0, num_inference_steps=12).images[0]
    solver = {"sol": "ddpm", "lune": "euler"}
    settings = dict(seed=5, num_inference_steps=steps, handoff=0.7, output_type="latent", solver=solver)
    whole = pipe.plan(num_inference_steps=steps, handoff=0.7, experts=pipe.experts(solver=solver))
    for strength, count in ((1.0, 10), (0.8, 8), (0.35, 3), (0.1, 1)):
        made = pipe("a portrait", image=picture, strength=strength, **settings)
        assert [(s.calls[0].name, s.level) for s in made.plan.steps] == [
            (s.calls[0].name, s.level) for s in whole.steps[steps - count :]
        ]
    assert len(pipe("a portrait", image=picture, **settings).plan) == 8  # diffusers' default strength
    # By hand: the image's latents, this seed's noise in this level's shares, the remaining steps.
    made = pipe("a portrait", image=picture, strength=0.35, guidance_scale=1.0, **settings)
    assert made.plan.experts == ("lune",)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        clean = pipe.vae.encode(pixels).latents * pipe.vae.config.scaling_factor
        noise = philox_normal(tuple(clean.shape), torch.tensor([5]), 0, stream=1)
        sigmas = [*(step.level.sigma for step in made.plan.steps), 0.0]
        x, embeds = (1 - sigmas[0]) * clean + sigmas[0] * noise, pipe.encode_texts("a portrait")
        for sigma, following in pairwise(sigmas):
            x = x - (sigma - following) * pipe.unet_lune(x, torch.tensor(1000 * sigma), embeds).sample
    torch.testing.assert_close(made.images, x, atol=1e-4, rtol=0)
    little = (pipe(PROMPT, image=picture, strength=0.1, **settings).images - clean).abs().mean()
    much = (pipe(PROMPT, image=picture, strength=0.9, **settings).images - clean).abs().mean()
    assert little < 0.5 * much


def test_images_of_every_kind_are_the_same_image(demo_pipeline):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (48, 80, 3), dtype=np.uint8)
    picture, unit = Image.fromarray(array), array.astype(np.float32) / 255
    tensor = torch.from_numpy(unit).permute(2, 0, 1)
    settings = dict(strength=0.5, seed=2, **QUICK)
    wanted = demo_pipeline(PROMPT, image=picture, **settings).images
    assert wanted.shape == (1, 4, 12, 20)  # the image's own size
    half, double = tensor.to(torch.bfloat16), unit.astype(np.float64)
    assert (half.float() - tensor).abs().max() > 1e-4
    eight = torch.from_numpy(array).permute(2, 0, 1)
    kinds = (
        unit,
        unit[None],
        double,
        tensor,
        tensor[None],
        tensor.clone().requires_grad_(),
        array,
        array[None],
    )
    kinds += (eight, eight[None], array.astype(np.uint16) * 257, picture.convert("RGBA"))
    for image in (*kinds, [picture], [tensor], [array], (eight,)):
        torch.testing.assert_close(
            demo_pipeline(PROMPT, image=image, **settings).images, wanted, atol=1e-4, rtol=0
        )
    both = demo_pipeline(
        [PROMPT, PROMPT],
        image=[picture, picture.rotate(180)],
        num_images_per_prompt=2,
        batch_size=3,
        **settings,
    ).images
    torch.testing.assert_close(both[:1], wanted, atol=2e-4, rtol=0)
    assert (both[2] - wanted[0]).abs().max() > 0.1
    mixed = demo_pipeline([PROMPT, PROMPT], image=[array, tensor], **settings).images
    torch.testing.assert_close(mixed[:1], wanted, atol=2e-4, rtol=0)
    rounded = demo_pipeline(PROMPT, image=half, **settings).images
    assert 1e-5 < (rounded - wanted).abs().max() < 0.1
    resized = demo_pipeline(PROMPT, image=picture, height=64, width=64, **settings).images
    assert resized.shape == (1, 4, 16, 16)
    given = torch.Generator().manual_seed(1)
    other = demo_pipeline(PROMPT, image=picture, strength=0.5, generator=given, **QUICK)
    assert other.seeds is None and not torch.equal(other.images, wanted)


def test_an_interrupted_run_stops_and_shows_what_there_is(demo_pipeline):
    seen, states = [], []

    def stop(pipe, step, timestep, tensors):
        seen.append(step)
        states.append(tensors["latents"].clone())
        pipe._interrupt = step == 1
        return {}

    made = demo_pipeline([PROMPT, "a portrait"], seed=0, batch_size=1, callback_on_step_end=stop, **QUICK)
    # Both batches did Sol's step; the first one began Lune's.
    assert seen == [0, 0, 1] and demo_pipeline.interrupt
    assert torch.equal(made.images, torch.cat([states[2], states[1]]))
    assert len(demo_pipeline(PROMPT, seed=0, callback_on_step_end=None, **QUICK).images) == 1
    assert not demo_pipeline.interrupt


def test_three_experts(demo_pipeline):
    """A pipeline's experts are its own: components, attributes, settings by any name."""
    parts = {k: v for k, v in demo_pipeline.components.items() if k in ("vae", "text_encoder", "tokenizer")}
    pipe = HybridPipeline(
        **parts,
        unet_sol=demo_pipeline.unet_sol,
        scheduler_sol=demo_pipeline.scheduler_sol,
        unet_lune=demo_pipeline.unet_lune,
        scheduler_lune=demo_pipeline.scheduler_lune,
        unet_detail=demo_pipeline.unet_lune,
        scheduler_detail=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        detail_guidance=1.5,
        handoff=[0.8, 0.3],
    )
    pipe.set_progress_bar_config(disable=True)
    assert pipe.expert_names == ("sol", "lune", "detail") and pipe.unet_detail is demo_pipeline.unet_lune
    assert set(pipe.components) == {*demo_pipeline.components, "unet_detail", "scheduler_detail"}
    made = pipe(PROMPT, seed=0, num_inference_steps={"sol": 2, "lune": 3, "detail": 4}, output_type="latent")
    assert [s.calls[0].name for s in made.plan.steps] == ["sol"] * 2 + ["lune"] * 3 + ["detail"] * 4
    assert made.plan.steps[-1].calls[0].guidance_scale == 1.5
    router = Spans((("lune", 0.5), ("detail", 0.0)))
    assert pipe.plan(router=router).experts == ("lune", "detail")
    assert pipe.plan("detail", 5).experts == ("detail",)
    assert pipe.model_cpu_offload_seq == "text_encoder->unet_sol->unet_lune->unet_detail->vae"
    again = HybridPipeline(**pipe.components, **pipe.parameters)
    again.set_progress_bar_config(disable=True)
    same = dict(seed=0, num_inference_steps={"sol": 2, "lune": 3, "detail": 4}, output_type="latent")
    assert torch.equal(again(PROMPT, **same).images, made.images)
    for arguments, message in (
        (dict(handoff=0.5), "3 experts need 2 handoffs"),
        (dict(handoff=[0.3, 0.8]), "each ending below the last"),
        (dict(num_inference_steps={"sol": 2, "lune": 3}), "come together"),
        (dict(num_inference_steps={"moon": 2}), "steps names moon"),
        (dict(negative_prompt={"moon": "x"}), "negative_prompt names moon"),
        (dict(guidance_scale={"moon": 2.0}), "guidance_scale names moon"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(PROMPT, **arguments)


def test_a_plan_is_made_once_for_the_same_settings_and_always_checked(demo_pipeline):
    first = demo_pipeline.plan(num_inference_steps=1, expert="sol")
    assert demo_pipeline.plan(num_inference_steps=1, expert="sol") is first
    own = demo_pipeline.plan(sol_steps=1, lune_steps=2)
    assert demo_pipeline.plan(sol_steps=1, lune_steps=2) is own != first
    stronger = demo_pipeline.experts(sol_guidance=9.0)
    assert demo_pipeline.plan("sol", 1, experts=stronger).steps[0].calls[0].guidance_scale == 9.0
    for wrong in (dict(num_inference_steps=True, expert="sol"), dict(sol_steps=1.0, lune_steps=2)):
        with pytest.raises(ValueError, match="whole number"):
            demo_pipeline.plan(**wrong)
    experts = demo_pipeline.experts(sol_guidance=8.0)
    model = weakref.ref(experts[0].model)
    demo_pipeline.plan("sol", 1, experts=experts)
    del experts
    gc.collect()
    assert model() is None, "what is kept holds no model"
    # A user's router may change from one plan to the next.
    asked = []

    def router(noise):
        asked.append(noise)
        return {"lune": 1.0}

    for _ in range(2):
        asked.clear()
        demo_pipeline.plan(router=router)
        assert asked


def test_what_diffusers_offers_passes_through(demo_pipeline):
    pipe = HybridPipeline.from_pretrained(experts_path())
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(PROMPT, seed=0, num_inference_steps=2, output_type="np").images
    pipe.enable_attention_slicing()
    processors = {
        type(p).__name__ for u in (pipe.unet_sol, pipe.unet_lune) for p in u.attn_processors.values()
    }
    assert processors == {"SlicedAttnProcessor"}
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing
    made = pipe(PROMPT, seed=0, num_inference_steps=2, output_type="np").images
    np.testing.assert_allclose(made, wanted, atol=0.05)
    pipe.disable_attention_slicing()
    pipe.disable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe.vae.use_tiling and not pipe.vae.use_slicing
    pipe.disable_vae_tiling()
    assert not pipe.vae.use_tiling
    assert pipe.to(torch.float64).unet_sol.dtype == torch.float64 and pipe.dtype == torch.float64


def test_compiled_experts_make_the_same_image(demo_pipeline):
    pipe = HybridPipeline.from_pretrained(experts_path())
    pipe.set_progress_bar_config(disable=True)
    pipe.compile(backend="eager")
    wanted = demo_pipeline(PROMPT, seed=0, **QUICK).images
    torch.testing.assert_close(pipe(PROMPT, seed=0, **QUICK).images, wanted, atol=1e-3, rtol=0)
    assert pipe.unet_sol._compiled_call_impl is not None


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
        (lambda d: (d / "model_index.json").write_text("{"), r"model_index\.json is damaged: no JSON"),
        (lambda d: shutil.rmtree(d / "unet_lune"), "no unet_lune/"),
        (lambda d: (d / "unet_sol" / "config.json").unlink(), "unet_sol cannot be loaded"),
        (
            lambda d: (d / "unet_sol" / "diffusion_pytorch_model.safetensors").unlink(),
            "unet_sol cannot be loaded",
        ),
        (
            lambda d: (d / "unet_sol" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x80pickle"),
            "unet_sol.*cannot be read as safetensors",
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
    assert names <= {".json", ".safetensors", ".txt", ".md"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt=None), "either prompt or prompt_embeds"),
        (dict(prompt=3), "string or a non-empty list"),
        (dict(prompt=[]), "string or a non-empty list"),
        (dict(height=60), "multiple of 16"),
        (dict(width=0.5), "a whole number from 1 to 16384, got 0.5"),
        (dict(num_images_per_prompt=0), "a whole number from 1 to 10000, got 0"),
        (dict(output_type="jpg"), "unknown output_type"),
        (dict(negative_prompt=["a", "b"]), "as many negative prompts"),
        (dict(handoff=1.0), "strictly between"),
        (dict(expert="luna"), "unknown expert"),
        (dict(expert="sol", handoff=0.5), "no handoff"),
        (dict(solver="magic"), "unknown solver"),
        (dict(solver={"luna": "ddpm"}), "solver names luna"),
        (dict(num_inference_steps=0), "steps must be a whole number from 1 to 10000, got 0"),
        (dict(sol_steps=3), "come together"),
        (dict(sol_steps=3, lune_steps=3, num_inference_steps=6), "not both"),
        (dict(seed=[1, 2]), "1 images need 1 seeds"),
        (dict(seed=1, generator=torch.Generator()), "seed or generator"),
        (dict(latents=torch.zeros(1, 4, 8, 8)), "must have shape"),
        (dict(callback_on_step_end_tensor_inputs=["x"]), "may name"),
        (dict(height=70), "use 64 or 80"),
        (dict(batch_size=0), "batch_size must be a whole number from 1 to 10000, got 0"),
        (dict(num_inference_steps=2.5), "steps must be a whole number"),
        (dict(guidance_scale=float("nan")), "guidance scale must be a finite number"),
        (dict(guidance_scale={"sol": "high"}), "sol: the guidance scale must be"),
        (dict(guidance_scale={"luna": 2.0}), "guidance_scale names luna"),
        (dict(guidance_rescale=1.5), "between 0 and 1"),
        (dict(guidance_window=(0.1, 0.5)), "guidance_window is"),
        (dict(guider="apg", sol_guidance=1.0), "sol: guider apg is a kind of guidance"),
        (dict(handoff=0.0), "strictly between"),
        (dict(handoff=[0.8, 0.4]), "2 experts need 1 handoffs"),
        (dict(handoff="late"), "the handoff must be a finite number, got 'late'"),
        (dict(strength=0.5), "give image too"),
        (dict(image=Image.new("RGB", (64, 64)), strength=0.0), "strength must lie above 0"),
        (dict(image=Image.new("RGB", (64, 64)), strength=1.1), "at most at 1"),
        (dict(image=Image.new("RGB", (64, 64)), strength=0.1, num_inference_steps=4), "at least 0.25"),
        (
            dict(image=Image.new("RGB", (60, 64)), height=60),
            "height must be a positive multiple of 16, got 60",
        ),
        (dict(image=np.full((64, 64, 3), np.nan)), "image holds NaN"),
        (dict(image=np.full((64, 64, 3), 88.0)), "floats from 88 to 88"),
        (dict(image=torch.full((3, 64, 64), -0.5)), "floats from -0.5"),
        (dict(image=torch.full((3, 64, 64), 88, dtype=torch.int64)), "image is of int64: give uint8"),
        (dict(image=np.zeros((64, 64, 4), np.uint8)), "three channels"),
        (dict(image=np.zeros((64, 64), np.uint8)), "three channels"),
        (dict(image=np.zeros((0, 64, 3), np.uint8)), "image is empty"),
        (dict(image=Image.new("I", (64, 64))), "32-bit integers"),
        (dict(image=Image.new("F", (64, 64), 255.0)), "floats from 255"),
        (dict(image=Image.new("1", (20000, 20000))), "the limit is"),
        (dict(image=[Image.new("RGB", (8, 8)), 3], prompt=["a", "b"]), "must be a PIL image.*got int"),
        (dict(prompt="a castle \ud83d"), r"the prompt holds half a surrogate pair.*a castle \\ud83d"),
        (dict(prompt=["a", "\udc00"]), "the prompt holds half a surrogate pair"),
        (dict(negative_prompt="\ud83d"), "the negative prompt holds half a surrogate pair"),
        (dict(negative_prompt={"sol": "\ud83d"}), "sol: the negative prompt holds half a surrogate pair"),
        (dict(image="castle.png"), "must be a PIL image"),
        (dict(image=[]), "at least one image"),
        (dict(image=torch.zeros(1, 1, 64, 64)), "three channels"),
        (dict(image=torch.zeros(2, 3, 64, 64)), "1 prompts need one image or as many, got 2"),
        (dict(image=Image.new("RGB", (64, 64)), latents=torch.zeros(1, 4, 16, 16)), "not both"),
        (dict(seed="seven"), "seed must be an integer"),
        (dict(seed=True), "seed must be an integer"),
        (dict(generator=[torch.Generator()] * 2), "one generator or 1, got 2"),
        (dict(prompt=None, prompt_embeds=torch.zeros(1, 32, 64)), "must be .prompts, tokens, 128."),
        (dict(negative_prompt="a", negative_prompt_embeds=torch.zeros(1, 32, 128)), "not both"),
        (dict(negative_prompt={"luna": "a"}), "negative_prompt names luna"),
        (dict(negative_prompt={"sol": 3}), "sol: a negative prompt is"),
    ],
)
def test_wrong_input_is_refused_before_any_work(demo_pipeline, monkeypatch, arguments, message):
    monkeypatch.setattr(demo_pipeline, "encode_texts", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        demo_pipeline(**{"prompt": PROMPT, **arguments})


def test_a_long_prompt_is_cut_with_a_warning(demo_pipeline, caplog):
    diffusers.utils.logging.enable_propagation()
    embeds = demo_pipeline.encode_texts("castle " * 60 + "street")
    diffusers.utils.logging.disable_propagation()
    assert embeds.shape[1] == demo_pipeline.tokenizer.model_max_length
    assert "street" in caplog.text and "cut off" in caplog.text
