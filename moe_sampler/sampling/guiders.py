"""Kinds of guidance beside the plain one, which depend on the sample, so that no row of a plan holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._numbers import number, whole

__all__ = ["GUIDERS", "PLAIN", "Guider", "read_guider"]

PLAIN = "cfg"
GUIDERS: Mapping[str, tuple[str, ...]] = {
    "cfg_zero_star": ("zero_init_steps",),
    "apg": ("eta", "norm_threshold", "momentum"),
}
"""By name: the settings that each has."""
MOST_ZERO_STEPS = 100


@dataclass(frozen=True, slots=True)
class Guider:
    """What is made of an unconditional and a conditional prediction, beside `guidance_scale`.

    Args:
        kind: "cfg_zero_star" (arXiv:2503.18886): the unconditional prediction is first scaled to fit the
            conditional one, sample by sample. "apg", adaptive projected guidance (arXiv:2410.02416): the part
            of the guidance along the predicted x0, which oversaturates, counts less.
        zero_init_steps: how many of a run's first steps CFG-Zero* leaves the noise as it is, so that nothing
            is computed for them: the run begins with the step after them. On flow paths.
        eta: what of the parallel part APG keeps: 0 is none, 1 all, which is plain guidance.
        norm_threshold: the longest that an APG update of a sample's x0 may be, as the Euclidean norm over
            all its elements; 0 is no limit.
        momentum: how much of the updates before an APG update contains, within an expert's guided steps in a
            row. Below 0, against them, is what its authors recommend.

    Raises:
        ValueError: another kind, a number out of range, or a setting that the kind doesn't have.
    """

    kind: str
    eta: float = 0.0
    norm_threshold: float = 0.0
    momentum: float = 0.0
    zero_init_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in GUIDERS:
            raise ValueError(f"a guider is {PLAIN}, {' or '.join(GUIDERS)}, got {self.kind!r}")
        for name in ("eta", "norm_threshold", "momentum"):
            object.__setattr__(self, name, number(f"{self.kind}'s {name}", getattr(self, name)))
        steps = whole(f"{self.kind}'s zero_init_steps", self.zero_init_steps, MOST_ZERO_STEPS, least=0)
        object.__setattr__(self, "zero_init_steps", steps)
        foreign = [name for own in GUIDERS.values() for name in own if getattr(self, name)]
        foreign = [name for name in foreign if name not in GUIDERS[self.kind]]
        if foreign:
            raise ValueError(f"{self.kind} has no {foreign[0]}: it has {', '.join(GUIDERS[self.kind])}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"{self.kind}'s eta must lie between 0 and 1, got {self.eta}")
        if self.norm_threshold < 0:
            raise ValueError(f"{self.kind}'s norm_threshold must not be negative, got {self.norm_threshold}")
        if not -1 < self.momentum < 1:
            raise ValueError(f"{self.kind}'s momentum must lie between -1 and 1, got {self.momentum}")

    def __str__(self) -> str:
        """In words, as `read_guider` takes it: "apg norm_threshold 5 momentum -0.5"."""
        said = [(name, getattr(self, name)) for name in GUIDERS[self.kind]]
        return " ".join([self.kind, *(f"{name} {value!r}" for name, value in said if value)])


def read_guider(what: str, value: Any) -> Guider | None:
    """A setting of the guider as given, checked: words, or a `Guider`; None is plain guidance.

    Raises:
        ValueError: none, named after `what`.
    """
    if value is None or isinstance(value, Guider):
        return value
    words = value.split() if isinstance(value, str) else []
    if words == [PLAIN]:
        return None
    try:
        if not words:
            raise ValueError(f"a guider is {PLAIN}, {' or '.join(GUIDERS)}, got {value!r}")
        kind, *settings = words
        return Guider(kind, **_settings(kind, settings))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _settings(kind: str, words: list[str]) -> dict[str, Any]:
    own = GUIDERS.get(kind, ())
    names, values = words[::2], words[1::2]
    unknown = [name for name in names if own and name not in own]
    if unknown:
        raise ValueError(f"{kind} has no {unknown[0]}: it has {', '.join(own)}")
    if len(names) != len(values) or len(set(names)) != len(names):
        raise ValueError(f"{kind} takes each setting once, with its value, as in {kind} {own[0]} 0")
    return {name: _value(name, text) for name, text in zip(names, values, strict=True)} if own else {}


def _value(name: str, text: str) -> float | int:
    read = int if name == "zero_init_steps" else float
    try:
        return read(text)
    except ValueError:
        raise ValueError(f"{name} must be a {'whole ' * (read is int)}number, got {text!r}") from None
