"""The page's fields: which there are, and the settings that they say. No Gradio, no models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._numbers import number, whole
from ..cli.by_name import levels as read_levels
from ..pipelines.choices import MAX_PROMPT, MAX_SIDE

__all__ = ["HYBRID", "LARGEST_SEED", "STUDENT", "Form", "Wrong", "levels_text"]

HYBRID = "hybrid"
STUDENT = "tinyflux"
"""As plans call the student (`tinyflux.sampling.expert`, which imports torch)."""
LARGEST_SEED = 2**53 - 1
"""A browser's numbers are floats: above this they skip some."""

_OWN = ("solver", "levels", "guidance")
"""What everyone has a field of, beside the steps."""

Values = Mapping[str, Any]


class Wrong(ValueError):
    """What a field holds cannot be.

    Args:
        field: its name; "" where no single one is to blame.
        message: what is wrong, and what can be done.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Form:
    """The fields of a page of these experts.

    Args:
        names: of the experts, from noise to data.
        defaults: the model's default settings.
        student: whether there is one.
    """

    names: Sequence[str]
    defaults: Mapping[str, Any]
    student: bool = False

    @property
    def makers(self) -> tuple[str, ...]:
        """Who may make the picture: all experts together, one alone, the student."""
        together = (HYBRID,) if len(self.names) > 1 else ()
        return (*together, *self.names, *((STUDENT,) if self.student else ()))

    @property
    def experts(self) -> tuple[str, ...]:
        """Everyone with settings of their own."""
        return (*self.names, *((STUDENT,) if self.student else ()))

    @property
    def handoffs(self) -> tuple[str, ...]:
        """A field for each handoff between two experts, from noise to data."""
        return tuple(f"handoff_{i}" for i in range(1, len(self.names)))

    @property
    def weights(self) -> tuple[str, ...]:
        """A field for the share of each expert that can guide the student."""
        return tuple(f"weight_{name}" for name in ("sol", "lune") if self.student and name in self.names)

    @property
    def first(self) -> dict[str, Any]:
        """Every field by its name, with what it holds at first."""
        levels = self._levels(self.defaults["handoff"])
        own = {}
        for name in self.experts:
            scale = self.defaults.get(f"{name}_guidance", 1.0)
            own |= {f"steps_{name}": ""} if name != STUDENT else {}
            own |= {f"solver_{name}": "", f"levels_{name}": "", f"guidance_{name}": scale}
        return {
            "prompt": "",
            "negative": "",
            "seed": 0,
            "maker": self.makers[0],
            "steps": self.defaults["num_inference_steps"],
            **dict(zip(self.handoffs, levels, strict=True)),
            **own,
            **dict.fromkeys(self.weights, 0.0),
            "reuse": 1,
            "speed": self.defaults.get("speed", "none"),
            "height": "",
            "width": "",
            "image": None,
            "strength": 0.8,
        }

    def _levels(self, handoff: Any) -> list[float]:
        """One a handoff; of a model that names one only, the others lie evenly below it."""
        given = list(handoff) if isinstance(handoff, Iterable) else [handoff]
        count = len(self.handoffs)
        if len(given) == count:
            return given
        return [given[0] * (count - i) / count for i in range(count)] if count else []

    def shown(self, maker: str) -> set[str]:
        """The fields that count for this maker."""
        fields = {"prompt", "negative", "seed", "maker", "steps", "height", "width"}
        if maker == STUDENT:
            guides = [weight.removeprefix("weight_") for weight in self.weights]
            fields |= {*self.weights, *(self.handoffs if guides else ())}
            return fields | {f"{what}_{name}" for what in _OWN for name in (STUDENT, *guides)}
        at_work = self.names if maker == HYBRID else (maker,)
        fields |= {*self.handoffs} if maker == HYBRID else set()
        fields |= {f"{what}_{name}" for what in ("steps", *_OWN) for name in at_work}
        return fields | {"reuse", "speed", "image", "strength"}

    def settings(self, values: Values, *, prompted: bool = True) -> dict[str, Any]:
        """What the fields say, as images remember it.

        Args:
            values: of every field.
            prompted: whether a prompt is needed by now.

        Raises:
            Wrong: at the first field that holds no such thing.
        """
        maker, found = values["maker"], {}
        if maker not in self.makers:
            raise Wrong("maker", f"use {' or '.join(self.makers)}")
        found["prompt"] = _text("prompt", values["prompt"])
        if prompted and not found["prompt"]:
            raise Wrong("prompt", "say what the picture shows")
        if values["negative"]:
            found["negative_prompt"] = _text("negative", values["negative"])
        found["seed"] = _whole("seed", values["seed"], LARGEST_SEED, 0)
        if maker in self.names and len(self.names) > 1:
            found["expert"] = maker
        shown = self.shown(maker)
        shares = {field: _number(field, values[field]) for field in self.weights if field in shown}
        if maker == STUDENT and not any(shares.values()):  # nobody guides it
            shown -= {field for field in shown if field.startswith(("handoff", *_OWN))}
            shown |= {f"{what}_{STUDENT}" for what in _OWN}
        own = self._own(values, shown)
        steps = self._steps(values, shown)
        listed = [name for name, levels in own.get("levels", {}).items() if isinstance(levels, list)]
        if isinstance(steps, Mapping) or len(listed) < sum(field.startswith("levels") for field in shown):
            found["num_inference_steps"] = steps  # else the levels say how many there are
        levels = [_number(field, values[field]) for field in self.handoffs if field in shown]
        if levels:
            found["handoff"] = levels[0] if len(levels) == 1 else levels
        found |= own
        found |= {
            f"{field.removeprefix('weight_')}_weight": share for field, share in shares.items() if share
        }
        for side in ("height", "width"):
            if values[side] != "":
                found[side] = _whole(side, values[side], MAX_SIDE)
        if "reuse" in shown and (values["reuse"] != 1 or values["speed"] != "none"):  # a speed has its own
            found["reuse"] = _whole("reuse", values["reuse"], 1000)
        if "speed" in shown and values["speed"] != "none":
            found["speed"] = values["speed"]
        if "image" in shown and values["image"]:
            found |= {"image": values["image"], "strength": _number("strength", values["strength"])}
        return found

    def _steps(self, values: Values, shown: set[str]) -> Any:
        fields = {name: f"steps_{name}" for name in self.names}
        own = {
            name: _whole(field, values[field], 1000, 0)
            for name, field in fields.items()
            if field in shown and values[field] != ""
        }
        return own or _whole("steps", values["steps"], 1000)

    def _own(self, values: Values, shown: set[str]) -> dict[str, Any]:
        named = [name for name in self.experts if f"guidance_{name}" in shown]
        solvers = {name: _text(f"solver_{name}", values[f"solver_{name}"]) for name in named}
        levels = {name: _levels(f"levels_{name}", values[f"levels_{name}"]) for name in named}
        given = {
            key: {name: one for name, one in own.items() if one}
            for key, own in (("solver", solvers), ("levels", levels))
        }
        scales = {name: _number(f"guidance_{name}", values[f"guidance_{name}"]) for name in named}
        return {"guidance_scale": scales} | {key: own for key, own in given.items() if own}

    def values(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The fields as they were when a picture of these settings was made; those it says nothing of as at
        first."""
        found = self.first
        texts = {"prompt": settings.get("prompt") or next(iter(settings.get("prompts", ())), None)}
        negative = settings.get("negative_prompt")
        texts["negative"] = negative if isinstance(negative, str) else None
        seeds = settings.get("seeds") or [settings.get("seed")]
        typed = {key: str(settings.get(key, "")) for key in ("height", "width")}
        plain = {key: settings.get(key) for key in ("speed", "image", "strength")}
        plain["reuse"] = _one_number(settings.get("reuse"))
        found |= {
            key: value
            for key, value in (texts | typed | plain | {"seed": seeds[0]}).items()
            if value is not None
        }
        found["maker"] = self._maker(settings)
        steps = settings.get("num_inference_steps")
        found |= (
            {"steps": steps}
            if isinstance(steps, int)
            else {f: str(n) for f, n in self._by_name("steps", steps).items()}
        )
        levels = settings.get("handoff")
        if levels is not None and found["maker"] in (HYBRID, STUDENT):
            found |= zip(self.handoffs, self._levels(levels), strict=True)
        for what, key in (("solver", "solver"), ("guidance", "guidance_scale")):
            found |= self._by_name(what, settings.get(key))
        levels = self._by_name("levels", settings.get("levels"))
        for name in self.experts:
            solver, spaced = found[f"solver_{name}"] or None, levels.get(f"levels_{name}")
            own = [self.defaults.get(f"{name}_{what}") for what in ("solver", "levels")]
            if solver == own[0] and (spaced or own[1] is None):
                found[f"solver_{name}"] = ""  # the model's own, which counts with any levels
            found[f"levels_{name}"] = "" if [solver, spaced] == own or not spaced else levels_text(spaced)
        weights = {field: settings.get(f"{field.removeprefix('weight_')}_weight") for field in self.weights}
        return found | {field: value for field, value in weights.items() if isinstance(value, int | float)}

    def _maker(self, settings: Mapping[str, Any]) -> str:
        if "student" in settings and self.student:
            return STUDENT
        named = settings.get("expert", HYBRID)
        return named if named in self.makers else self.makers[0]

    def _by_name(self, what: str, given: Any) -> dict[str, Any]:
        """One value for all experts, or a mapping by their names, as fields."""
        own = given if isinstance(given, Mapping) else dict.fromkeys(self.experts, given)
        return {f"{what}_{n}": v for n, v in own.items() if n in self.experts and v is not None}


def _one_number(reuse: Any) -> int | None:
    """A reuse that is one number, for all or for each."""
    first, *others = (reuse.values() or [None]) if isinstance(reuse, Mapping) else [reuse]
    return first if isinstance(first, int) and all(own == first for own in others) else None


def _text(field: str, value: Any) -> str:
    if len(value or "") > MAX_PROMPT or "\0" in (value or ""):
        raise Wrong(
            field, f"this is no text for a picture: it has a NUL, or more than {MAX_PROMPT:,} characters"
        )
    return (value or "").strip()


def levels_text(levels: str | Sequence[float]) -> str:
    """Levels as a field holds them, and the command line."""
    return levels if isinstance(levels, str) else ",".join(map(str, levels))


def _levels(field: str, value: Any) -> str | list[float]:
    text = _text(field, value)
    try:
        return read_levels(text) if text else ""
    except ValueError:
        raise Wrong(field, "give a spacing's name, or noise levels as in 0.9,0.5,0.2") from None


def _whole(field: str, value: Any, most: int, least: int = 1) -> int:
    """From a text, or a float that is whole, as browsers give it."""
    plain = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, str) and value.strip().isdecimal():
        plain = int(value)
    try:
        return whole("this", plain, most, least)
    except ValueError:
        raise Wrong(field, f"give a whole number from {least} to {most:,}") from None


def _number(field: str, value: Any) -> float:
    try:
        return number("this", value)
    except ValueError:
        raise Wrong(field, "give a number") from None
