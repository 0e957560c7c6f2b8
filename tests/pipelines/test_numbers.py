"""Numbers a call is given: NumPy's too, never strings; limits at once; seeds and guidance as in diffusers."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image

PROMPT = "a castle with two towers, at dusk"
QUICK = dict(num_inference_steps=4, output_type="latent")


def test_numpy_scalars_are_numbers(demo_pipeline):
    plain = dict(guidance_scale=2.5, handoff=0.5, eta=0.5, seed=3, height=64, width=64, shift=3.0, **QUICK)
    kinds = {float: np.float32, int: np.int64}
    scalars = {key: kinds.get(type(value), type(value))(value) for key, value in plain.items()}
    wanted = demo_pipeline(PROMPT, num_images_per_prompt=2, batch_size=1, solver="ddim", **plain)
    got = demo_pipeline(
        PROMPT, num_images_per_prompt=np.int32(2), batch_size=np.int16(1), solver="ddim", **scalars
    )
    assert torch.equal(wanted.images, got.images) and wanted.seeds == got.seeds == [3, 4]
    assert wanted.plan == got.plan and got.plan.to_json() == wanted.plan.to_json()
    by_array = demo_pipeline(PROMPT, num_images_per_prompt=2, seed=np.array([3, 4]), **QUICK)
    assert by_array.seeds == [3, 4] and demo_pipeline(PROMPT, seed=torch.tensor(3), **QUICK).seeds == [3]


def test_strength_as_a_numpy_scalar(demo_pipeline):
    picture = Image.new("RGB", (64, 64), "navy")
    whole = demo_pipeline(PROMPT, image=picture, strength=0.5, seed=1, **QUICK).images
    assert torch.equal(
        whole, demo_pipeline(PROMPT, image=picture, strength=np.float32(0.5), seed=1, **QUICK).images
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12, 30, 49, 100, 999, 1000])
def test_the_advised_strength_works(demo_pipeline, steps):
    settings = dict(expert="lune", num_inference_steps=steps)
    with pytest.raises(ValueError, match="give at least") as found:
        demo_pipeline.plan(strength=0.0001, **settings)
    advised = str(found.value).rsplit(" ", 1)[1]
    assert len(demo_pipeline.plan(strength=float(advised), **settings)) == 1
    digit = 10.0 ** -len(advised.partition(".")[2])
    if float(advised) - 2 * digit > 0:  # and it is the smallest, but for the rounding of the last digit
        with pytest.raises(ValueError, match="give at least"):
            demo_pipeline.plan(strength=float(advised) - 2 * digit, **settings)


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        *((key, "3") for key in ("guidance_scale", "sol_guidance", "handoff", "shift", "eta", "seed")),
        *((key, "3") for key in ("guidance_rescale", "num_inference_steps", "height", "width")),
        *((key, "3") for key in ("num_images_per_prompt", "batch_size", "strength")),
        *(
            (key, 3.5)
            for key in ("num_inference_steps", "num_images_per_prompt", "batch_size", "height", "seed")
        ),
        *((key, True) for key in ("guidance_scale", "handoff", "num_inference_steps", "height", "seed")),
    ],
)
def test_what_is_no_number_is_refused_with_what_was_given(demo_pipeline, setting, given):
    image = {"image": Image.new("RGB", (64, 64))} if setting == "strength" else {}
    with pytest.raises(ValueError, match=rf"got {given!r}"):
        demo_pipeline(PROMPT, **image, **{setting: given})


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        (dict(num_inference_steps=10**9), "from 1 to 10000, got 1000000000"),
        (dict(sol_steps=10**9, lune_steps=1), "from 1 to 10000, got 1000000000"),
        (dict(height=10**6), "height must be a whole number from 1 to 16384, got 1000000"),
        (dict(width=2**70), "width must be a whole number from 1 to 16384"),
        (dict(height=16384, width=16384), "more than the limit of .*MOE_SAMPLER_MAX_PIXELS"),
        (dict(shift=1e308), r"shift must lie between 0\.001 and 1000, got 1e\+308"),
        (dict(num_images_per_prompt=10**9), "from 1 to 10000, got 1000000000"),
        (dict(prompt=["a", "b"], num_images_per_prompt=9000), "more than the 10000 images"),
        (dict(batch_size=10**9), "from 1 to 10000, got 1000000000"),
        (dict(image=Image.new("RGB", (64, 64)), height=10**6), "from 1 to 16384, got 1000000"),
    ],
)
def test_the_absurd_is_refused_at_once_with_the_limit(demo_pipeline, settings, limit):
    begun = time.monotonic()
    with pytest.raises(ValueError, match=limit):
        demo_pipeline(**{"prompt": PROMPT, **settings})
    assert time.monotonic() - begun < 1.0


def test_more_pixels_can_be_allowed(demo_pipeline, monkeypatch):
    monkeypatch.setenv("MOE_SAMPLER_MAX_PIXELS", "4000")
    with pytest.raises(ValueError, match="64 x 64 pixels are more than the limit of 4000"):
        demo_pipeline(PROMPT, **QUICK)
    monkeypatch.setenv("MOE_SAMPLER_MAX_PIXELS", "4096")
    demo_pipeline(PROMPT, **QUICK)


def test_torchs_seed_decides_where_none_is_given(demo_pipeline):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        first, second = (demo_pipeline(PROMPT, num_images_per_prompt=2, **QUICK) for _ in range(2))
        torch.manual_seed(11)
        again = demo_pipeline(PROMPT, num_images_per_prompt=2, **QUICK)
    assert torch.equal(first.images, again.images) and first.seeds == again.seeds
    assert first.seeds != second.seeds and not torch.equal(first.images, second.images)
    by_seed = demo_pipeline(PROMPT, num_images_per_prompt=2, seed=first.seeds, **QUICK)
    assert torch.equal(by_seed.images, first.images)


@pytest.mark.parametrize("scale", [0, 0.5, 1, -2.0])
def test_guidance_of_one_or_less_is_the_prompt_alone(demo_pipeline, scale):
    calls = []
    hook = demo_pipeline.unet_lune.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    try:
        made = demo_pipeline(PROMPT, seed=2, guidance_scale=scale, **QUICK).images
    finally:
        hook.remove()
    assert set(calls) == {1}
    assert torch.equal(made, demo_pipeline(PROMPT, seed=2, guidance_scale=1.0, **QUICK).images)
    other = demo_pipeline("a portrait", seed=2, guidance_scale=scale, **QUICK).images
    assert (made - other).abs().max() > 0.1
