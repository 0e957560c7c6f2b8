"""Options whose value is one for all experts, or each one's: VALUE and NAME=VALUE."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..sampling.reuse import AUTO

__all__ = [
    "ByExpert",
    "full_calls",
    "levels",
    "number",
    "over_previous",
    "split_name",
    "steps_over",
    "whole",
    "window",
]

_NAMED = re.compile(r"([a-z][a-z0-9_]*)=(.*)", re.DOTALL)


def split_name(option: str, text: str) -> tuple[str, str]:
    """NAME=VALUE, or a ValueError."""
    match = _NAMED.fullmatch(text)
    if match is None:
        raise ValueError(f"{option} {text}: give NAME=..., with an expert's name")
    return match[1], match[2]


@dataclass(frozen=True)
class ByExpert:
    """An option's value for all experts, and for some of them alone."""

    option: str
    shared: Any = None
    own: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        option: str,
        texts: Sequence[str] | None,
        read: Callable[[str], Any] = str,
        known: Sequence[str] | None = None,
        own: Mapping[str, Any] | None = None,
    ) -> ByExpert:
        """From a repeated option.

        Args:
            option: its name, for messages.
            texts: VALUE or NAME=VALUE.
            read: from text to value; a ValueError says that it can't be.
            known: names that count as such, any by default; other texts with = are values.
            own: from further options, None where they weren't given.
        """
        shared, found = None, {name: value for name, value in (own or {}).items() if value is not None}
        for text in texts or ():
            match = _NAMED.fullmatch(text)
            name, rest = (None, text) if match is None else match.groups()
            if known is not None and name not in known:
                name, rest = None, text
            try:
                value = read(rest)
            except ValueError as error:
                raise ValueError(f"{option} {text}: {error}") from None
            if (shared is not None) if name is None else (name in found):
                raise ValueError(f"{option} {'of ' + name if name else 'for all experts'} is given twice")
            shared, found = (value, found) if name is None else (shared, {**found, name: value})
        return cls(option, shared, found)

    def __bool__(self) -> bool:
        return self.shared is not None or bool(self.own)

    def over(self, previous: Any, names: Sequence[str]) -> Any:
        """This in place of `previous`, which remains for experts that nothing was said of."""
        unknown = [name for name in self.own if name not in names]
        if unknown:
            raise ValueError(f"{self.option} names {unknown[0]}, but the experts are {', '.join(names)}")
        if not self.own:
            return previous if self.shared is None else self.shared
        rest = previous if self.shared is None else self.shared
        values = {name: rest.get(name) if isinstance(rest, Mapping) else rest for name in names}
        values |= self.own
        return {name: value for name, value in values.items() if value is not None}


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("give a number") from None


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("give a whole number") from None


def levels(text: str) -> str | list[float]:
    """A spacing's name, or LEVEL,LEVEL,..."""
    return text if text[:1].isalpha() else [number(level) for level in text.split(",")]


def window(text: str) -> list[float]:
    levels = text.split(":")
    if len(levels) != 2:
        raise ValueError("give HIGH:LOW, as in 0.9:0.3")
    return [number(level) for level in levels]


def full_calls(text: str) -> int | str | list[int] | list[list[float]]:
    """K; auto; N,N,...; or LEVEL:K,LEVEL:K,..."""
    if text == AUTO:
        return AUTO
    parts = text.split(",")
    if ":" in text:
        pairs = [part.split(":") for part in parts]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("give LEVEL:K, as in 0.5:2,0:4")
        return [[number(level), whole(every)] for level, every in pairs]
    if any(letter.isalpha() for letter in text):
        raise ValueError("give auto, every which call is full as in 3, or their numbers as in 0,3,5")
    return whole(text) if len(parts) == 1 else [whole(part) for part in parts]


def over_previous(previous: Mapping[str, Any], names: Sequence[str], **given: ByExpert) -> dict[str, Any]:
    """Settings by their names: what was given, and of `previous` what that leaves."""
    merged = {key: value.over(previous.get(key), names) for key, value in given.items()}
    return {key: value for key, value in merged.items() if value is not None}


def steps_over(previous: Mapping[str, Any], given: ByExpert, names: Sequence[str]) -> dict[str, Any]:
    """`num_inference_steps`: steps of some experts don't go with those that others had before."""
    if given.shared is not None and given.own:
        raise ValueError("give either a number of steps in all or each expert's, not both")
    given.over(None, names)
    steps = given.shared if given.shared is not None else dict(given.own)
    steps = previous.get("num_inference_steps") if steps == {} else steps
    return {} if steps is None else {"num_inference_steps": steps}
