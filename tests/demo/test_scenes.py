"""Scenes and captions: deterministic, true, and flat where they should be."""

import numpy as np
import pytest

from moe_sampler.demo.captions import EXAMPLE_PROMPTS, caption, describe, vocabulary
from moe_sampler.demo.scenes import KINDS, draw_scene, render


def _flat_share(image: np.ndarray) -> float:
    """Share of pixels that differ from their right neighbour by two grey levels at most."""
    return float((np.abs(np.diff(image.astype(int), axis=1)).max(-1) <= 2).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_picture(kind):
    first, again = (render(draw_scene(5, kind)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert np.abs(first.astype(int) - render(draw_scene(6, kind))).mean() > 5


@pytest.mark.parametrize("kind", KINDS)
def test_structure_is_flat_and_keeps_the_layout(kind):
    for seed in range(6):
        # By day: lit windows change the masses' tone at night.
        scene = draw_scene(seed, kind) if kind == "portrait" else draw_scene(seed, kind, time="day")
        full, flat = render(scene), render(scene, structure=True)
        assert _flat_share(flat) > max(0.7, _flat_share(full) + 0.05)
        # The same masses in the same places: the pictures agree once both are blurred to 8x8.
        coarse = [image.reshape(8, 8, 8, 8, 3).mean((1, 3)).ravel() for image in (full, flat)]
        assert np.corrcoef(*coarse)[0, 1] > 0.85


def test_structure_does_not_depend_on_texture_randomness():
    """The two pictures of a scene share every geometric draw: a flat mass's outline is the textured one's."""
    scene = draw_scene(3, "castle", ground="meadow", time="day")
    full, flat = render(scene).astype(int), render(scene, structure=True).astype(int)
    sky = np.s_[0:8, :8]
    assert np.abs(full[sky] - flat[sky]).max() <= 40


def test_attributes_can_be_fixed_and_are_checked():
    scene = draw_scene(1, "castle", towers="two", time="dusk")
    assert (scene.attributes["towers"], scene.attributes["time"]) == ("two", "dusk")
    with pytest.raises(ValueError, match="no attribute"):
        draw_scene(1, "castle", towers="seven")
    with pytest.raises(ValueError, match="unknown kind"):
        draw_scene(1, "ship")


_SIGNS = {
    "day": {"day", "daylight", "noon", "sunny"},
    "dusk": {"dusk", "sunset", "evening"},
    "night": {"night", "moonlight"},
    "dawn": {"dawn", "sunrise", "morning"},
}


def test_captions_mention_only_what_is_true():
    rng = np.random.default_rng(0)
    for seed in range(400):
        scene = draw_scene(seed)
        text, said = describe(scene, rng)
        words = set(text.replace(",", " ").split())
        assert said.items() <= scene.attributes.items()
        if "time" in scene.attributes:
            for time, signs in _SIGNS.items():
                assert not words & signs or scene.attributes["time"] == time, text
            assert bool(words & _SIGNS[scene.attributes["time"]]) == ("time" in said), text
        for number, digit in (("one", None), ("two", "2"), ("three", "3")):
            if {number, digit} & words:
                assert scene.attributes["towers"] == number, text
        for hair in ("blond", "red", "black"):
            if f"{hair} hair" in text:
                assert scene.attributes["hair"] == hair, text
        if " car" in text and "no cars" not in text:
            assert f"{scene.attributes['car']} car" in text


def test_captions_leave_things_out_and_vary():
    scene = draw_scene(0, "castle")
    rng = np.random.default_rng(1)
    drawn = [describe(scene, rng) for _ in range(300)]
    counts = np.bincount([len(said) for _, said in drawn], minlength=7)
    assert (counts > 0).all(), "from nothing to everything"
    assert len({text for text, _ in drawn}) > 200
    assert caption(scene, np.random.default_rng(2), keep=1.0) == caption(
        scene, np.random.default_rng(2), keep=1.0
    )


def test_the_vocabulary_covers_every_caption_and_the_example_prompts():
    words = set(vocabulary())
    rng = np.random.default_rng(3)
    texts = [caption(draw_scene(seed + 77_000), rng) for seed in range(500)]
    for text in (*texts, *EXAMPLE_PROMPTS):
        assert set(text.replace(",", " ,").split()) <= words, text
