"""Scenes and captions: deterministic, true, and flat where they should be."""

import re

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
    "night": {"night", "moonlight", "moon"},
    "dawn": {"dawn", "sunrise", "morning"},
}


_NUMBERS = {
    "a": "one",
    "one": "one",
    "single": "one",
    "2": "two",
    "two": "two",
    "3": "three",
    "three": "three",
}
_COUNTED = {"tower": "towers", "row": "rows", "tree": "trees", "balloon": "balloons", "car": "cars"}
_SIDE = r"(?:to the |on the )?(left|right)(?: side)?"


def _read(text: str, kind: str) -> dict[str, str]:
    """What a caption says of the layout, read by rules of its own."""
    found: dict[str, str] = {}
    for number, thing in re.findall(
        r"\b(a|one|single|two|2|three|3) (?:(?:red|blue|yellow|white) )?(tower|row|tree|balloon|car)s?\b",
        text,
    ):
        found[_COUNTED[thing]] = _NUMBERS[number]
    for thing in re.findall(r"\bno (tree|balloon|car)s\b", text):
        found[_COUNTED[thing]] = "none"
    if kind == "castle":
        for name, thing in (("trees_side", "trees?"), ("sun", "(?:sun|moon)")):
            if side := re.search(rf"\b{thing} (?:{_SIDE}|in (front))", text):
                found[name] = side[1] or side[2]
    elif kind == "portrait":
        for name, thing in (("balloons_side", "balloons?"), ("lamp", "lamp")):
            if side := re.search(rf"\b{thing} {_SIDE}", text):
                found[name] = side[1]
        if "no lamp" in text:
            found["lamp"] = "none"
    else:
        for thing, side in re.findall(rf"\b(trees|lamps) {_SIDE}", text):
            found[f"{side}_side"] = thing
        if alone := re.search(r"\b(trees|lamps)(?! (?:to|on) the (?:left|right))", text):
            found["left_side"] = found["right_side"] = alone[1]
        if pair := re.search(r"a (\w+) car (?:to the )?(left|right) of a (\w+) car", text):
            first, second = ("car", "other_car") if pair[2] == "left" else ("other_car", "car")
            found |= {"cars": "two", first: pair[1], second: pair[3]}
        elif pair := re.search(r"a (\w+) car on the left and a (\w+) car on the right", text):
            found |= {"cars": "two", "car": pair[1], "other_car": pair[2]}
        elif pair := re.search(r"(?:two|2) (\w+) cars", text):
            found |= {"car": pair[1], "other_car": pair[1]}
        elif one := re.search(rf"\ba (?:(\w+) )?car\b(?: {_SIDE}| in the (left|right) lane)?", text):
            found |= {"car": one[1]} if one[1] else {}
            found |= {"lane": one[2] or one[3]} if one[2] or one[3] else {}
    return found


def test_captions_mention_only_what_is_true_and_all_that_they_claim_to():
    rng = np.random.default_rng(0)
    for seed in range(1500):
        scene = draw_scene(seed)
        text, said = describe(scene, rng)
        words = set(text.replace(",", " ").split())
        assert said.items() <= scene.attributes.items()
        if "time" in scene.attributes:
            for time, signs in _SIGNS.items():
                assert not words & signs or scene.attributes["time"] == time, text
            assert bool(words & _SIGNS[scene.attributes["time"]]) == ("time" in said), text
        for hair in ("blond", "red", "black"):
            if f"{hair} hair" in text:
                assert scene.attributes["hair"] == hair, text
        layout = (KINDS[scene.kind].LAYOUT.keys() | {"car", "other_car"}) - {"position"}
        assert _read(text, scene.kind) == {name: said[name] for name in said if name in layout}, text


def test_the_subject_has_its_place_where_no_other_thing_could_take_it_for_its_own():
    rng = np.random.default_rng(4)
    for seed in range(600):
        scene = draw_scene(seed)
        text, said = describe(scene, rng)
        first = re.match(r"(?:an? \w+ of )?[\w ]*?(?=,| with\b|$)", text)[0]
        things = re.search(r"\b(trees?|balloons?|cars?|lamps?|sun|moon)\b", text)
        if "position" in said and things:
            assert re.search(r"\b(left|right|centre|center|middle)\b", first), text


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
