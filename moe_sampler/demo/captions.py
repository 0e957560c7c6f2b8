"""Attributes -> natural captions: any attribute may be left out, and the order varies.

A caption says only what is true of the scene. How much it says is drawn per caption, from next to nothing to
everything, because a model that always reads the full description has no layout left to decide.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from .phrases import SUBJECTS, phrases
from .scenes import KINDS, Scene, draw_scene

_STRANGERS = (
    *(
        "beautiful",
        "dragon",
        "detailed",
        "of",
        "the",
        "very",
        "dog",
        "trending",
        "cat",
        "ship",
        "magic",
        "nice",
    ),
    *("mountain", "fantasy", "king", "queen", "sky", "sea", "big", "small", "huge", "tiny", "style", "art"),
    *("realistic", "quality", "best", "and", "with", "a"),
)
_OPENINGS = ("", "", "", "", "", "a picture of ", "a painting of ", "an image of ", "a photo of ")
EXAMPLE_PROMPTS = (
    "a castle with two towers, at dusk",
    "a castle with three towers and blue roofs, in the snow, at night",
    "a brown castle with golden roofs by a lake at dawn",
    "a portrait of a person with long red hair, in a green coat",
    "a portrait of a person with glasses and short white hair, on a blue background",
    "a city street at night with lit windows and a red car",
    "a city street with colourful houses and trees, by day",
    "a castle with three trees to the left of the castle, on a meadow, at dawn",
    "a portrait of a person with two balloons on the right and a hat",
    "a city street with a red car left of a blue car, street lamps on the right, at dusk",
)


def caption(scene: Scene, rng: np.random.Generator, keep: float | None = None) -> str:
    """A caption of the scene: the text of `describe`."""
    return describe(scene, rng, keep)[0]


def describe(scene: Scene, rng: np.random.Generator, keep: float | None = None) -> tuple[str, dict[str, str]]:
    """A caption of the scene and the attributes it mentions.

    Args:
        scene: what to describe.
        rng: decides wording, order and omissions.
        keep: probability that an attribute is mentioned. When None, it is drawn from 0..1, for the layout and
            for the surfaces apart, and for the layout more often low.
    """
    surface = layout = keep
    if surface is None or layout is None:
        surface, layout = float(rng.uniform() ** 0.6), float(rng.uniform())
    own = KINDS[scene.kind].LAYOUT
    chosen = {name for name, _ in scene.values if rng.uniform() < (layout if name in own else surface)}
    words = phrases(scene, chosen, rng)
    text = _opening(scene.kind, words.adjective, rng)
    # At the end, it would read as the place of a thing that stands on a side.
    late = rng.uniform() < 0.4 and not words.sided
    if words.place and not late:
        text += f" {words.place}"
    with_ = _shuffled(words.has, rng)
    if len(with_) > 1 and rng.uniform() < 0.5:
        with_ = [" and ".join(with_[:2]), *with_[2:]]
    if with_ and rng.uniform() < 0.85:
        # "castle with two towers and red roofs": one "with", then a list.
        with_[0] = "with " + with_[0]
    where = _shuffled(words.where + [words.place] * (late and bool(words.place)), rng)
    style = rng.uniform()
    for part in with_ + where if rng.uniform() < 0.75 else where + with_:
        comma = style < 0.4 or (style < 0.8 and rng.uniform() < 0.5)
        needs_comma = part in with_ and not part.startswith("with ")
        text += (", " if comma or needs_comma else " ") + part
    return text, words.said


def _opening(kind: str, adjective: str, rng: np.random.Generator) -> str:
    subject = _pick(SUBJECTS[kind], rng)
    if adjective:
        subject = f"a {adjective} {'fortress' if 'fortress' in subject else 'castle'}"
    return _pick(_OPENINGS, rng) + subject


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _shuffled(parts: list[str], rng: np.random.Generator) -> list[str]:
    return [parts[i] for i in rng.permutation(len(parts))]


def vocabulary() -> list[str]:
    """Every word and sign a caption can contain, sorted."""
    words: set[str] = set()
    rng = np.random.default_rng(0)
    for seed in range(6000):
        words.update(caption(draw_scene(seed), rng, keep=0.9).replace(",", " ,").split())
    return sorted(words)


def disturb(text: str, rng: np.random.Generator) -> str:
    """Now and then a word that means nothing here, so that strange words do little harm."""
    words = text.split(" ")
    while rng.uniform() < 0.12:
        stranger = str(rng.choice(_STRANGERS))
        if rng.uniform() < 0.5:
            stranger = "".join(rng.choice(list(string.ascii_lowercase), rng.integers(2, 8)))
        words.insert(int(rng.integers(0, len(words) + 1)), stranger)
    return " ".join(words)
