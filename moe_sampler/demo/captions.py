"""Attributes -> natural captions: any attribute may be left out, and the order varies.

A caption says only what is true of the scene. How much it says is drawn per caption, from next to nothing to
everything, because a model that always reads the full description has no layout left to decide.
"""

from __future__ import annotations

import string

import numpy as np

from .scenes import Scene, draw_scene

_TIMES = {
    "day": ("by day", "in daylight", "at noon", "during the day", "on a sunny day"),
    "dusk": ("at dusk", "at dusk", "at sunset", "in the evening"),
    "night": ("at night", "at night", "by night", "in the moonlight"),
    "dawn": ("at dawn", "at dawn", "at sunrise", "in the morning"),
}
_PLACES = {
    "meadow": ("on a meadow", "on a green meadow", "in a field", "on a hill"),
    "lake": ("by a lake", "at a lake", "on a lake", "by the water"),
    "desert": ("in the desert", "in a desert"),
    "snow": ("in the snow", "in winter", "in snow"),
    "forest": ("in a forest", "in the forest", "in the woods"),
}
_NUMBERS = {"one": ("one", "one", "a single"), "two": ("two", "two", "2"), "three": ("three", "three", "3")}
_POSITIONS = {
    "left": ("on the left", "on the left side", "to the left"),
    "centre": ("in the centre", "in the center", "in the middle"),
    "right": ("on the right", "on the right side", "to the right"),
}
_HOUSES = {
    "brick": ("brick houses", "red brick houses"),
    "pale": ("pale houses",),
    "colourful": ("colourful houses", "colorful houses"),
    "glass": ("glass towers", "glass buildings", "tall buildings"),
}
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
_UNSAYABLE = {("extra", "plain"), ("windows", "dark"), ("roadside", "bare")}
_OPENINGS = ("", "", "", "", "", "a picture of ", "a painting of ", "an image of ", "a photo of ")
HEADS = {
    "castle": ("a castle", "a castle", "a castle", "castle", "an old castle", "the castle", "a fortress"),
    "portrait": ("a portrait", "a portrait of a person", "portrait of a person", "a person", "a face"),
    "street": (
        "a city street",
        "a city street",
        "a street",
        "city street",
        "a street in a city",
        "a town street",
    ),
}
EXAMPLE_PROMPTS = (
    "a castle with two towers, at dusk",
    "a castle with three towers and blue roofs, in the snow, at night",
    "a brown castle with golden roofs by a lake at dawn",
    "a portrait of a person with long red hair, in a green coat",
    "a portrait of a person with glasses and short white hair, on a blue background",
    "a city street at night with lit windows and a red car",
    "a city street with colourful houses and trees, by day",
)


def caption(scene: Scene, rng: np.random.Generator, keep: float | None = None) -> str:
    """A caption of the scene: the text of `describe`."""
    return describe(scene, rng, keep)[0]


def describe(scene: Scene, rng: np.random.Generator, keep: float | None = None) -> tuple[str, dict[str, str]]:
    """A caption of the scene and the attributes it mentions.

    Args:
        scene: what to describe.
        rng: decides wording, order and omissions.
        keep: probability that an attribute is mentioned; drawn from 0..1 (more often high) when None.
    """
    keep = float(rng.uniform() ** 0.6) if keep is None else keep
    chosen = {name: value for name, value in scene.values if rng.uniform() < keep}
    said = {name: value for name, value in chosen.items() if (name, value) not in _UNSAYABLE}
    head = str(rng.choice(_OPENINGS)) + _head(scene.kind, said, rng)
    with_, where = _phrases(said, head, rng)
    parts = [str(p) for p in rng.permutation(with_)]
    if len(parts) > 1 and rng.uniform() < 0.5:
        parts = [" and ".join(parts[:2]), *parts[2:]]
    if parts and rng.uniform() < 0.85:
        # "castle with two towers and red roofs": one "with", then a list.
        parts[0] = "with " + parts[0]
    rest = [str(p) for p in rng.permutation(where)]
    tail = parts + rest if rng.uniform() < 0.75 else rest + parts
    text = head
    style = rng.uniform()
    for part in tail:
        comma = style < 0.4 or (style < 0.8 and rng.uniform() < 0.5)
        needs_comma = part in parts and not part.startswith("with ")
        text += (", " if comma or needs_comma else " ") + part
    return text, said


def _head(kind: str, said: dict[str, str], rng: np.random.Generator) -> str:
    head = str(rng.choice(HEADS[kind]))
    if kind == "castle" and "stone" in said and rng.uniform() < 0.6:
        head = f"a {said['stone']} {'fortress' if 'fortress' in head else 'castle'}"
    return head


def _phrases(said: dict[str, str], head: str, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """What the scene has ("two towers") and where, when or in what it is ("at dusk")."""

    def pick(options) -> str:
        return str(rng.choice(options))

    with_: list[str] = []
    where: list[str] = []
    for name, value in said.items():
        if name == "time":
            where.append(pick(_TIMES[value]))
        elif name == "towers":
            with_.append(f"{pick(_NUMBERS[value])} {'tower' if value == 'one' else 'towers'}")
        elif name == "roofs":
            plain = ("battlements", "battlements", "flat roofs")
            with_.append(
                pick(plain) if value == "battlements" else f"{pick(('', '', 'pointed '))}{value} roofs"
            )
        elif name == "stone" and value not in head:
            with_.append(pick((f"{value} walls", f"{value} stone")))
        elif name == "ground":
            where.append(pick(_PLACES[value]))
        elif name == "position":
            where.append(pick(_POSITIONS[value]))
        elif name == "hair":
            length = said.get("length")
            with_.append(f"{length} {value} hair" if length else f"{value} hair")
        elif name == "length" and "hair" not in said:
            with_.append(f"{value} hair")
        elif name == "skin":
            with_.append(f"{value} skin")
        elif name == "coat":
            where.append(pick((f"in a {value} coat", f"wearing a {value} coat", f"in a {value} jacket")))
        elif name == "extra":
            with_.append(value if value == "glasses" else f"a {value}")
        elif name == "background":
            wall = (f"on a {value} background", f"in front of a {value} wall", f"against a {value} wall")
            where.append(pick(wall))
        elif name == "houses":
            with_.append(pick(_HOUSES[value]))
        elif name == "windows":
            with_.append(pick(("lit windows", "glowing windows", "lights in the windows")))
        elif name == "car":
            with_.append(f"a {value} car" if value != "none" else "no cars")
        elif name == "roadside":
            with_.append("trees" if value == "trees" else pick(("street lamps", "lamps")))
    return with_, where


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
