"""The evaluation's measures, on sets whose answer is known."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from bench.demo.errors import crossing
from bench.demo.evaluator import attributes_right, share_right
from bench.demo.metrics import frechet_distance, high_frequency_ratio, patch_distance, power_spectrum
from bench.demo.report import attributes_table
from moe_sampler.demo.attributes import GROUPS, HEADS, group_of, kind_of, labels
from moe_sampler.demo.scenes import draw_scene, render


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([render(draw_scene(seed)) for seed in range(60)])


def test_frechet_distance_against_the_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 6)), rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) + 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected / np.trace(cov_b), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_the_spectrum_finds_the_frequency_of_a_wave():
    x = np.arange(64)
    wave = np.repeat((127 + 100 * np.sin(2 * np.pi * 20 * x / 64))[None, None, :, None], 64, axis=1)
    assert np.argmax(power_spectrum(np.repeat(wave, 3, axis=-1).round())) in (19, 20)


def test_smoothing_lowers_high_frequencies_and_moves_patches_away(pictures):
    smooth = (pictures + np.roll(pictures, 1, 2).astype(int) + np.roll(pictures, -1, 2).astype(int)) // 3
    assert high_frequency_ratio(pictures, pictures) == pytest.approx(1)
    assert high_frequency_ratio(smooth, pictures) < 0.8
    assert patch_distance(smooth, pictures) > patch_distance(pictures, pictures)
    assert patch_distance(pictures // 2, pictures) > 3 * patch_distance(pictures, pictures)


def test_attribute_counting_counts_what_the_caption_claims():
    scenes = [draw_scene(1, "castle", trees="two"), draw_scene(2, "castle"), draw_scene(2, "portrait")]
    said = [{name: scene.attributes[name] for name in ("time", "trees")} for scene in scenes[:1]]
    said += [{"time": scenes[1].attributes["time"]}, {}]
    right = {head: column.numpy().copy() for head, column in zip(HEADS, labels(scenes).T, strict=True)}
    expected = {"kind": (3, 3), "castle.time": (2, 2), "castle.trees": (1, 1)}
    assert attributes_right(right, scenes, said) == expected
    right["castle.time"][0] = (right["castle.time"][0] + 1) % len(HEADS["castle.time"])
    tally = attributes_right(right, scenes, said)
    assert tally == {**expected, "castle.time": (1, 2)}
    assert (share_right(tally), share_right(tally, "composition")) == (5 / 6, 1)
    assert share_right(tally, "surface") == 1 / 2 and np.isnan(share_right({}, "surface"))


def test_every_attribute_has_a_group():
    layout = {head for head in HEADS if group_of(head) == "composition"}
    assert {"castle.towers", "portrait.balloons_side", "street.lane"} <= layout
    assert {"count", "place", "relation"} == {kind_of(head) for head in layout}
    assert {group_of(head) for head in HEADS} == {None, *GROUPS} and group_of("kind") is None
    assert group_of("castle.roofs") == group_of("street.other_car") == kind_of("portrait.hair") == "surface"


def test_the_report_groups_attributes_and_says_how_often_they_were_asked_for():
    runs = {
        "lune": [{"castle.time": (1, 2), "castle.trees": (3, 4)}, {"castle.time": (2, 2)}],
        "hybrid": [{"kind": (2, 2), "castle.time": (2, 2), "castle.trees": (4, 4)}],
    }
    assert attributes_table(runs).splitlines()[2:] == [
        "| kind | kind | 2 |  | 100.0 % |",
        "| castle: trees | count | 4 | 75.0 % | 100.0 % |",
        "| castle: time | surface | 2 | 75.0 % | 100.0 % |",
    ]


def test_crossing_interpolates_and_says_when_there_is_none():
    rows = [{"s": 0.9, "sol": 0.9, "lune": 1.0}, {"s": 0.7, "sol": 1.1, "lune": 1.0}]
    assert crossing(rows) == pytest.approx(0.8)
    assert crossing([{**row, "sol": 2.0} for row in rows]) is None
