"""What a user of diffusers tries first: copies, components, text features, callbacks, schedules, loaders."""

from __future__ import annotations

import copy
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback

from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path
from moe_sampler.kernels import philox_normal

PROMPT = "a castle with two towers, at dusk"
QUICK = dict(num_inference_steps=4, output_type="latent", seed=3)


def run(pipe, prompt=PROMPT, **settings):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, **{**QUICK, **settings}).images


def stable_diffusion(pipe, unet="sol"):
    """diffusers' own pipeline of the demo's parts."""
    return diffusers.StableDiffusionPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=getattr(pipe, f"unet_{unet}"),
        scheduler=getattr(pipe, f"scheduler_{unet}"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize(
    "copied",
    [lambda pipe: pickle.loads(pickle.dumps(pipe)), copy.deepcopy],
    ids=["pickle", "deepcopy"],
)
def test_a_copy_makes_the_same_image_and_has_weights_of_its_own(demo_pipeline, copied):
    other = copied(demo_pipeline)
    assert torch.equal(run(other), run(demo_pipeline))
    with torch.no_grad():
        next(other.unet_sol.parameters()).zero_()
    assert next(demo_pipeline.unet_sol.parameters()).abs().max() > 0
    assert other.config == demo_pipeline.config


def test_a_pipeline_whose_weights_are_in_files_is_not_copied():
    pipe = HybridPipeline.from_pretrained(experts_path(), offload="expert")
    for way in (pickle.dumps, copy.deepcopy, HybridPipeline.from_pipe):
        with pytest.raises(ValueError, match=r'set_offload\("none"\)'):
            way(pipe)


def test_components_bring_the_models_defaults(demo_pipeline):
    own = HybridPipeline(**demo_pipeline.components, handoff=0.45, lune_guidance=3.0)
    again = HybridPipeline(**own.components)
    for key in ("experts", "handoff", "num_inference_steps", "sol_guidance", "lune_guidance"):
        assert again.config[key] == own.config[key]
    assert again.config["handoff"] == 0.45 and again.config["lune_guidance"] == 3.0
    assert again.config["sol_guidance"] == demo_pipeline.config["sol_guidance"] != 7.5
    assert again.unet_sol is demo_pipeline.unet_sol
    assert torch.equal(run(again), run(demo_pipeline, handoff=0.45, lune_guidance=3.0))
    with pytest.raises(TypeError, match="hand_off"):
        HybridPipeline(**{**own.components, "defaults": {"hand_off": 0.5}})


def test_one_expert_of_several_components(demo_pipeline):
    parts = {k: v for k, v in demo_pipeline.components.items() if not k.endswith("_sol")}
    assert HybridPipeline(**parts).expert_names == ("lune",)


def test_from_pipe_of_stable_diffusion_is_one_expert(demo_pipeline):
    other = stable_diffusion(demo_pipeline)
    made = HybridPipeline.from_pipe(other)
    assert made.expert_names == ("base",) and made.unet_base is other.unet
    guidance = demo_pipeline.config["sol_guidance"]
    own = {"sol": "ddpm", "lune": "euler"}  # it has no default solvers
    assert torch.equal(run(made, guidance_scale=guidance), run(demo_pipeline, expert="sol", solver=own))
    lune = {"unet_lune": demo_pipeline.unet_lune, "scheduler_lune": demo_pipeline.scheduler_lune}
    both = HybridPipeline.from_pipe(other, expert="sol", handoff=demo_pipeline.config["handoff"], **lune)
    assert torch.equal(run(both, guidance_scale=guidance), run(demo_pipeline, solver=own))
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no scheduler"):
        other.scheduler = None
        HybridPipeline.from_pipe(other)


def test_from_pipe_of_a_hybrid_shares_its_parts(demo_pipeline):
    made = HybridPipeline.from_pipe(demo_pipeline, handoff=0.5)
    assert made.unet_sol is demo_pipeline.unet_sol and made.config["handoff"] == 0.5
    assert made.config["sol_guidance"] == demo_pipeline.config["sol_guidance"]
    made.set_offload("expert")  # the files are known, too
    made.set_offload("none")
    assert demo_pipeline.unet_sol.dtype == torch.float32


def test_encode_prompt_is_diffusers(demo_pipeline):
    other = stable_diffusion(demo_pipeline)
    prompts = (PROMPT, "a portrait")
    theirs = other.encode_prompt(list(prompts), "cpu", 2, True, ["a hat", "rain"])
    mine = demo_pipeline.encode_prompt(prompts, "cpu", 2, True, ("a hat", "rain"))
    for own, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own, want)
        assert not own.requires_grad
    embeds, none = demo_pipeline.encode_prompt(PROMPT, "cpu", 1, False)
    assert none is None and len(embeds) == 1
    embeds, negative = demo_pipeline.encode_prompt(PROMPT, negative_prompt={"lune": "a hat"})
    made = run(demo_pipeline, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert torch.equal(made, run(demo_pipeline, negative_prompt={"lune": "a hat"}))


def test_clip_skip_leaves_out_the_last_layers(demo_pipeline):
    short = copy.deepcopy(demo_pipeline)
    layers = getattr(short.text_encoder, "text_model", short.text_encoder).encoder.layers
    for skip in (1, len(layers) - 1):
        short.text_encoder = copy.deepcopy(demo_pipeline.text_encoder)
        encoder = getattr(short.text_encoder, "text_model", short.text_encoder).encoder
        encoder.layers = encoder.layers[: len(encoder.layers) - skip]
        skipped, negative = demo_pipeline.encode_prompt(PROMPT, clip_skip=skip)
        torch.testing.assert_close(skipped, short.encode_texts(PROMPT))
        assert torch.equal(negative, demo_pipeline.encode_texts(""))  # as in diffusers
    assert torch.equal(
        demo_pipeline.encode_prompt(PROMPT, clip_skip=0)[0], demo_pipeline.encode_texts(PROMPT)
    )


def test_clip_skip_in_a_call(demo_pipeline):
    embeds, _ = demo_pipeline.encode_prompt(PROMPT, clip_skip=1)
    skipped = run(demo_pipeline, clip_skip=1)
    assert torch.equal(skipped, run(demo_pipeline, None, prompt_embeds=embeds))
    assert not torch.equal(skipped, run(demo_pipeline))
    for wrong in (99, -1, 1.0, True):
        with pytest.raises(ValueError, match="clip_skip"):
            run(demo_pipeline, clip_skip=wrong)
    with pytest.raises(ValueError, match="leave it out"):
        run(demo_pipeline, None, prompt_embeds=embeds, clip_skip=1)


def test_nothing_outside_a_call_needs_gradients(demo_pipeline):
    images = demo_pipeline.decode_latents(torch.randn(1, 4, 16, 16), "np")
    assert isinstance(images, np.ndarray)
    assert not demo_pipeline.decode_latents(torch.randn(1, 4, 16, 16), "pt").requires_grad
    assert not demo_pipeline.encode_texts(PROMPT).requires_grad


def test_vae_tiling_of_the_demo(demo_pipeline):
    pipe = copy.deepcopy(demo_pipeline)
    latents = 0.5 * torch.randn(1, 4, 40, 56, generator=torch.Generator().manual_seed(0))
    whole = pipe.decode_latents(latents, "pt")
    pipe.enable_vae_tiling()
    assert torch.equal(pipe.decode_latents(latents, "pt"), whole)  # one tile
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 32, 128
    tiled = pipe.decode_latents(latents, "pt")
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.01
    assert run(pipe, image=tiled, strength=0.5).shape == (1, 4, 12, 20)


def by_hand(pipe, steps, told):
    """Lune alone from seed 3: diffusers' scheduler and guidance written out; `told(i)` gives the step's
    (texts, scale)."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler_lune.config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    x = philox_normal((1, 4, 16, 16), torch.tensor([3]), 0, stream=1)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            texts, scale = told(i)
            states = pipe.encode_texts(texts)
            uncond, cond = pipe.unet_lune(torch.cat([x, x]), t, encoder_hidden_states=states).sample.chunk(2)
            x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
    return x


def test_a_callback_changes_guidance_and_texts(demo_pipeline):
    seen = []
    night = demo_pipeline.encode_texts(["a hat", "a castle at night"])

    def change(pipe, step, timestep, tensors):
        seen.append((pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance))
        if step == 1:
            pipe._guidance_scale = 3.0
            return {"prompt_embeds": night}
        return {}

    names = ["prompt_embeds"]
    call = dict(expert="lune", solver="euler", guidance_scale=2.0, callback_on_step_end_tensor_inputs=names)
    made = run(demo_pipeline, callback_on_step_end=change, **call)
    want = by_hand(
        demo_pipeline,
        4,
        lambda i: (["", PROMPT], 2.0) if i < 2 else (["a hat", "a castle at night"], 3.0),
    )
    torch.testing.assert_close(made, want, atol=1e-4, rtol=0)
    assert seen == [(4, 2.0, True), (4, 2.0, True), (4, 3.0, True), (4, 3.0, True)]


def test_the_rows_of_a_callbacks_texts_are_diffusers(demo_pipeline):
    shapes, guided = [], demo_pipeline.encode_texts(["", PROMPT])

    def look(pipe, step, timestep, tensors):
        shapes.append(len(tensors["prompt_embeds"]))
        if shapes[-1] == 2:
            assert torch.equal(tensors["prompt_embeds"], guided)
            assert torch.equal(tensors["negative_prompt_embeds"], guided[:1])
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    call = dict(guidance_scale={"sol": 2.0, "lune": 1.0}, callback_on_step_end_tensor_inputs=names)
    made = run(demo_pipeline, callback_on_step_end=look, **call)
    plan = demo_pipeline.plan(num_inference_steps=4)
    assert shapes == [2 if step.calls[0].name == "sol" else 1 for step in plan.steps] and 2 in shapes
    assert torch.equal(made, run(demo_pipeline, guidance_scale={"sol": 2.0, "lune": 1.0}))


def test_negative_prompt_embeds_of_a_callback_are_everyones_who_shared_them(demo_pipeline):
    hat = demo_pipeline.encode_texts("a hat")

    def change(pipe, step, timestep, tensors):
        return {"negative_prompt_embeds": hat} if step == 0 else {}

    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append(tensors["negative_prompt_embeds"])
        return change(pipe, step, timestep, tensors)

    run(
        demo_pipeline,
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=("negative_prompt_embeds",),
    )
    assert not torch.equal(seen[0], hat) and all(torch.equal(one, hat) for one in seen[1:])


def test_diffusers_cutoff_callback(demo_pipeline):
    """The steps after the cutoff run without guidance, each batch's own, as a window does it."""
    levels = demo_pipeline.plan(num_inference_steps=6).noise_levels
    window = (1.0, (levels[2] + levels[3]) / 2)
    want = run(demo_pipeline, num_inference_steps=6, guidance_window=window)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)
    for callback in (cutoff, MultiPipelineCallbacks([cutoff])):
        assert torch.equal(run(demo_pipeline, num_inference_steps=6, callback_on_step_end=callback), want)
    two = run(demo_pipeline, [PROMPT] * 2, num_inference_steps=6, callback_on_step_end=cutoff, batch_size=1)
    assert torch.equal(two[:1], want)
    with pytest.raises(ValueError, match="batch_size=1"):
        run(demo_pipeline, [PROMPT] * 2, num_inference_steps=6, callback_on_step_end=cutoff)


@pytest.mark.parametrize(
    ("scale", "settings", "message"),
    [
        ("5", {}, "finite number"),
        (float("nan"), {}, "finite number"),
        (4.0, {"guidance_scale": 1.0}, "begin with a guidance scale above 1"),
    ],
)
def test_what_a_callback_cannot_ask_for(demo_pipeline, scale, settings, message):
    def change(pipe, step, timestep, tensors):
        pipe._guidance_scale = scale
        return {}

    with pytest.raises(ValueError, match=message):
        run(demo_pipeline, callback_on_step_end=change, **settings)


def test_image_takes_latents(demo_pipeline):
    picture = demo_pipeline(PROMPT, seed=1, num_inference_steps=4, output_type="np").images
    pixels = 2 * torch.from_numpy(picture).permute(0, 3, 1, 2) - 1
    with torch.no_grad():
        encoded = demo_pipeline.vae.encode(pixels).latents * demo_pipeline.vae.config.scaling_factor
    settings = dict(strength=0.5)
    from_pixels = run(demo_pipeline, image=picture[0], **settings)
    torch.testing.assert_close(run(demo_pipeline, image=encoded, **settings), from_pixels, atol=1e-4, rtol=0)
    wide = torch.randn(2, 4, 8, 24)
    assert run(demo_pipeline, [PROMPT] * 2, image=wide, **settings).shape == wide.shape
    for wrong, message in (
        (dict(image=wide, height=64), "32 x 96 pixels"),
        (dict(image=torch.full((1, 4, 16, 16), torch.nan)), "finite"),
        (dict(image=torch.randn(3, 4, 16, 16)), "one image or as many"),
    ):
        with pytest.raises(ValueError, match=message):
            run(demo_pipeline, [PROMPT] * 2, **wrong)


def test_listed_timesteps_and_sigmas_are_the_schedulers(demo_pipeline):
    pipe = demo_pipeline
    plan = pipe.plan("sol", timesteps=(999, 640, 20))
    assert [step.calls[0].timestep for step in plan.steps] == [999, 640, 20]
    cumulated = diffusers.DDPMScheduler.from_config(pipe.scheduler_sol.config).alphas_cumprod.double()
    for step, abar in zip(plan.steps, cumulated[[999, 640, 20]].tolist(), strict=True):
        assert step.level.alpha == pytest.approx(abar**0.5, abs=1e-5)
    given = [0.9, 0.5, 0.2]
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler_lune.config)
    theirs.set_timesteps(sigmas=given)
    plan = pipe.plan("lune", sigmas=np.array(given))
    assert plan.noise_levels == pytest.approx(theirs.sigmas[:-1].tolist(), abs=1e-6)
    both = pipe.plan(timesteps={"sol": [981, 700]}, sigmas={"lune": [0.6, 0.3]})
    assert [s.calls[0].name for s in both.steps] == ["sol", "sol", "lune", "lune"] and not both.from_image
    made = run(pipe, None, prompt_embeds=pipe.encode_texts(PROMPT), num_inference_steps=None, plan=both)
    direct = run(pipe, num_inference_steps=None, timesteps={"sol": (981, 700)}, sigmas={"lune": (0.6, 0.3)})
    assert torch.equal(made, direct)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(timesteps=[999, 500]), "by name"),
        (dict(timesteps={"sol": [999, 500]}), "nothing lists the steps of lune"),
        (dict(expert="lune", timesteps=[999, 500]), "give sigmas"),
        (dict(expert="sol", sigmas=[1.0, 0.5]), "give timesteps"),
        (dict(expert="sol", timesteps=[500, 999]), "descend"),
        (dict(expert="sol", timesteps=[999, 500.5]), "whole"),
        (dict(expert="sol", timesteps=[1000, 500]), "outside"),
        (dict(expert="sol", timesteps="999"), "list of numbers"),
        (dict(expert="lune", sigmas=[1.5, 0.5]), "at most at 1"),
        (dict(expert="lune", sigmas=[]), "list of numbers"),
        (dict(timesteps={"sol": [300]}, sigmas={"lune": [0.9]}), "from\\s+noise to data"),
        (dict(timesteps={"luna": [300]}), "luna"),
        (dict(expert="sol", timesteps=[999, 500], num_inference_steps=2), "leave out num_inference_steps"),
    ],
)
def test_schedules_that_cannot_be(demo_pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        demo_pipeline(PROMPT, **settings)


def test_tuples_wherever_lists(demo_pipeline):
    def generators():
        return [torch.Generator().manual_seed(i) for i in range(2)]

    prompts, negatives = [PROMPT, "a portrait"], ["a hat", "rain"]
    lists = dict(negative_prompt={"sol": negatives}, generator=generators(), seed=None)
    tuples = dict(negative_prompt={"sol": tuple(negatives)}, generator=tuple(generators()), seed=None)
    assert torch.equal(run(demo_pipeline, tuple(prompts), **tuples), run(demo_pipeline, prompts, **lists))
    assert torch.equal(
        run(demo_pipeline, tuple(prompts), negative_prompt=tuple(negatives), seed=(1, 2)),
        run(demo_pipeline, prompts, negative_prompt=negatives, seed=[1, 2]),
    )


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_dtypes_by_name(keyword):
    pipe = HybridPipeline.from_pretrained(experts_path(), **{keyword: "bfloat16"})
    assert pipe.unet_sol.dtype == pipe.vae.dtype == torch.bfloat16
    mixed = HybridPipeline.from_pretrained(
        experts_path(), **{keyword: {"default": "torch.float16", "vae": torch.float32}}
    )
    assert mixed.unet_lune.dtype == torch.float16 and mixed.vae.dtype == torch.float32
    for wrong, message in (
        ("int8", "float16"),
        ("nn", "float16"),
        (torch.int32, "float16"),
    ):
        with pytest.raises(ValueError, match=message):
            HybridPipeline.from_pretrained(experts_path(), **{keyword: wrong})


def test_loaders_keywords_that_are_so_anyway():
    pipe = HybridPipeline.from_pretrained(
        experts_path(),
        safety_checker=None,
        requires_safety_checker=False,
        feature_extractor=None,
        use_safetensors=True,
        low_cpu_mem_usage=True,
        device_map="cpu",
        custom_pipeline=None,
        trust_remote_code=True,
        revision=None,
        variant=None,
    )
    assert pipe.device.type == "cpu"


@pytest.mark.parametrize(
    "keyword",
    [
        *(dict(safety_checker=object()), dict(requires_safety_checker=True), dict(use_safetensors=False)),
        *(dict(device_map="balanced"), dict(device_map={"": 0}), dict(max_memory={0: "1GB"})),
        *(dict(custom_pipeline="lpw"), dict(quantization_config=object())),
        *(dict(scheduler=object()), dict(unet=object()), dict(output_loading_info=True)),
    ],
    ids=lambda keyword: next(iter(keyword)),
)
def test_loaders_keywords_that_cannot_be_followed_are_named(keyword, monkeypatch):
    monkeypatch.setattr("moe_sampler.pipelines.pretrained.load_parts", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=next(iter(keyword))):
        HybridPipeline.from_pretrained(experts_path(), **keyword)


def test_a_model_given_by_the_wrong_name_is_one_line(demo_pipeline):
    for keyword in (dict(unet=demo_pipeline.unet_sol), dict(scheduler=demo_pipeline.scheduler_sol)):
        with pytest.raises(ValueError, match=r"^\w+=(UNet2DConditionModel|\w+Scheduler) is not") as error:
            HybridPipeline.from_pretrained(experts_path(), **keyword)
        assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.zeros((1, 4, 16, 16), np.float32), "latents must be a tensor, got ndarray"),
        ([[0.0]], "latents must be a tensor, got list"),
        (torch.zeros(1, 4, 16, 16, dtype=torch.int64), r"latents must be floats, got torch\.int64"),
        (torch.zeros(1, 4, 9, 9), "latents must have shape"),
    ],
)
def test_latents_that_are_none(demo_pipeline, latents, message):
    with pytest.raises(ValueError, match=message):
        demo_pipeline(PROMPT, num_inference_steps=2, latents=latents)


def test_there_is_no_one_scheduler(demo_pipeline):
    with pytest.raises(AttributeError, match="scheduler_sol and scheduler_lune"):
        demo_pipeline.scheduler = demo_pipeline.scheduler_sol
    with pytest.raises(AttributeError, match="scheduler_sol and scheduler_lune"):
        _ = demo_pipeline.scheduler
    with pytest.raises(AttributeError, match="unet_sol and unet_lune"):
        demo_pipeline.unet = demo_pipeline.unet_sol
    assert not hasattr(demo_pipeline, "scheduler")
