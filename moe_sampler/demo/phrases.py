"""How a scene's attributes are put into words.

Each kind of scene has a function that takes the attributes to speak of and returns `Sayings`. It may say less
(a portrait without glasses is no news) or more (a moon tells that it is night), never what is not true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .scenes import KINDS, Scene


@dataclass
class Sayings:
    """Parts of a caption.

    has: what the subject has or what stands beside it ("two towers"). where: where, when or in what it is
    ("at dusk"). place: its own place in the picture. adjective: goes before the subject. said: the attributes
    that these tell. sided: whether something other than the subject is spoken of that can stand on one side.
    """

    has: list[str] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    place: str = ""
    adjective: str = ""
    said: dict[str, str] = field(default_factory=dict)
    sided: bool = False


Pick = Callable[[Sequence[str]], str]

SUBJECTS = {
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
_TIMES = {
    "day": ("by day", "in daylight", "at noon", "during the day", "on a sunny day"),
    "dusk": ("at dusk", "at dusk", "at sunset", "in the evening"),
    "night": ("at night", "at night", "by night", "in the moonlight"),
    "dawn": ("at dawn", "at dawn", "at sunrise", "in the morning"),
}
_GROUNDS = {
    "meadow": ("on a meadow", "on a green meadow", "in a field", "on a hill"),
    "lake": ("by a lake", "at a lake", "on a lake", "by the water"),
    "desert": ("in the desert", "in a desert"),
    "snow": ("in the snow", "in winter", "in snow"),
    "forest": ("in a forest", "in the forest", "in the woods"),
}
_NUMBERS = {"one": ("one", "one", "a single"), "two": ("two", "two", "2"), "three": ("three", "three", "3")}
_PLACES = {
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
_OWN = ("position", "towers", "rows")
"""Layout of the subject itself."""
_PLAIN_ROOFS = ("battlements", "battlements", "flat roofs")
_LIT = ("lit windows", "glowing windows", "lights in the windows")


def phrases(scene: Scene, chosen: set[str], rng: np.random.Generator) -> Sayings:
    """Words for the attributes in `chosen`, as `rng` picks them."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    facts = {name: value for name, value in scene.values if name in chosen}
    words = _OF[scene.kind](facts, scene.attributes, pick)
    words.sided = any(name in words.said for name in KINDS[scene.kind].LAYOUT if name not in _OWN)
    return words


def _castle(facts: Mapping[str, str], true: Mapping[str, str], pick: Pick) -> Sayings:
    """facts: what to speak of; true: everything there is."""
    words = Sayings(said=dict(facts))
    _time_and_place(words, facts, pick)
    if "towers" in facts:
        words.has.append(_counted(facts["towers"], "tower", pick))
    if "roofs" in facts:
        colour = f"{pick(('', '', 'pointed '))}{facts['roofs']} roofs"
        words.has.append(pick(_PLAIN_ROOFS) if facts["roofs"] == "battlements" else colour)
    if "stone" in facts:
        if pick("abc") == "a":
            words.has.append(pick((f"{facts['stone']} walls", f"{facts['stone']} stone")))
        else:
            words.adjective = facts["stone"]
    if "rows" in facts:
        number = facts["rows"]
        one = ("a row of windows", "one row of windows")
        words.has.append(pick(one) if number == "one" else f"{pick(_NUMBERS[number])} rows of windows")
    if "ground" in facts:
        words.where.append(pick(_GROUNDS[facts["ground"]]))
    if "sun" in facts:
        night = true["time"] == "night"
        words.has.append(f"the {'moon' if night else 'sun'} {_beside(facts['sun'], 'castle', pick)}")
        if night:
            words.said["time"] = "night"
    _counted_beside(words, "trees", "tree", "castle", facts, true, pick)
    return words


def _portrait(facts: Mapping[str, str], true: Mapping[str, str], pick: Pick) -> Sayings:
    words = Sayings(said=dict(facts))
    _time_and_place(words, facts, pick)
    hair = [facts[name] for name in ("length", "hair") if name in facts]
    if hair:
        words.has.append(" ".join([*hair, "hair"]))
    if "skin" in facts:
        words.has.append(f"{facts['skin']} skin")
    if "coat" in facts:
        coat = facts["coat"]
        words.where.append(pick((f"in a {coat} coat", f"wearing a {coat} coat", f"in a {coat} jacket")))
    if facts.get("extra") == "plain":
        del words.said["extra"]
    elif "extra" in facts:
        words.has.append("glasses" if facts["extra"] == "glasses" else f"a {facts['extra']}")
    if "background" in facts:
        wall = facts["background"]
        words.where.append(
            pick((f"on a {wall} background", f"in front of a {wall} wall", f"against a {wall} wall"))
        )
    if facts.get("lamp") == "none":
        _missing(words, "lamp", "lamp", pick)
    elif "lamp" in facts:
        words.has.append(f"a lamp {_beside(facts['lamp'], 'person', pick)}")
    _counted_beside(words, "balloons", "balloon", "person", facts, true, pick)
    return words


def _street(facts: Mapping[str, str], true: Mapping[str, str], pick: Pick) -> Sayings:
    words = Sayings(said=dict(facts))
    _time_and_place(words, facts, pick)
    if "houses" in facts:
        words.has.append(pick(_HOUSES[facts["houses"]]))
    if facts.get("windows") == "lit":
        words.has.append(pick(_LIT))
    elif "windows" in facts:
        del words.said["windows"]
    _roadsides(words, facts, pick)
    _cars(words, facts, true, pick)
    return words


def _roadsides(words: Sayings, facts: Mapping[str, str], pick: Pick) -> None:
    """ "trees" alone are on both sides of the street."""
    sides = {side: facts[f"{side}_side"] for side in ("left", "right") if f"{side}_side" in facts}
    things = {"trees": ("trees",), "lamps": ("street lamps", "lamps")}
    if len(sides) == 2 and sides["left"] == sides["right"] != "bare":
        words.has.append(pick(things[sides["left"]]) + pick(("", "", " on both sides")))
        return
    for side, thing in sides.items():
        if thing == "bare":
            del words.said[f"{side}_side"]
        else:
            words.has.append(f"{pick(things[thing])} {pick(_PLACES[side])}")


def _cars(words: Sayings, facts: Mapping[str, str], true: Mapping[str, str], pick: Pick) -> None:
    about = {"cars", "lane", "car", "other_car"} & facts.keys()
    if not about:
        return
    words.said["cars"] = true["cars"]
    if true["cars"] == "none":
        words.has.append("no cars")
    elif true["cars"] == "one":
        colour = f"{facts['car']} " if "car" in facts else ""
        lane = true["lane"]
        where = f" {pick((f'in the {lane} lane', *_PLACES[lane]))}" if "lane" in facts else ""
        words.has.append(f"a {colour}car{where}")
    elif {"car", "other_car"} <= facts.keys():
        left, right = facts["car"], facts["other_car"]
        both = (
            f"a {left} car {_beside('left', f'{right} car', pick, 'a')}",
            f"a {right} car {_beside('right', f'{left} car', pick, 'a')}",
            f"a {left} car on the left and a {right} car on the right",
        )
        words.has.append(pick(both) if left != right else f"{pick(_NUMBERS['two'])} {left} cars")
    else:
        # One colour of two tells nothing: of which?
        for name in ("car", "other_car"):
            words.said.pop(name, None)
        words.has.append(_counted("two", "car", pick))


def _time_and_place(words: Sayings, facts: Mapping[str, str], pick: Pick) -> None:
    if "time" in facts:
        words.where.append(pick(_TIMES[facts["time"]]))
    if "position" in facts:
        words.place = pick(_PLACES[facts["position"]])


def _counted(number: str, thing: str, pick: Pick) -> str:
    return f"{pick(_NUMBERS[number])} {thing}{'' if number == 'one' else 's'}"


def _beside(side: str, of: str, pick: Pick, article: str = "the") -> str:
    if side == "front":
        return pick((f"in front of {article} {of}", "in front"))
    full = (f"{side} of {article} {of}", f"to the {side} of {article} {of}")
    return pick((*full, f"on the {side}") if article == "the" else full)


def _missing(words: Sayings, name: str, things: str, pick: Pick) -> None:
    """What isn't there is spoken of now and then."""
    if pick("abc") == "a":
        words.has.append(f"no {things}")
    else:
        del words.said[name]


def _counted_beside(
    words: Sayings,
    name: str,
    thing: str,
    of: str,
    facts: Mapping[str, str],
    true: Mapping[str, str],
    pick: Pick,
) -> None:
    """ "two trees left of the castle", or less of it."""
    side = f"{name}_side"
    if facts.get(name) == "none":
        _missing(words, name, f"{thing}s", pick)
        return
    if not {name, side} & facts.keys():
        return
    if name in facts:
        what = (
            f"a {thing}" if facts[name] == "one" and pick("ab") == "a" else _counted(facts[name], thing, pick)
        )
    elif true[name] == "one":
        what, words.said[name] = f"a {thing}", "one"
    else:
        what = f"{thing}s"
    words.has.append(f"{what} {_beside(facts[side], of, pick)}" if side in facts else what)


_OF = {"castle": _castle, "portrait": _portrait, "street": _street}
