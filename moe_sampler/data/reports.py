"""Words about data: how several names are said in a line, and warnings."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

__all__ = ["kinds", "printable", "say", "some"]

_LOGGER = logging.getLogger("moe_sampler.data")


def printable(text: object) -> str:
    """A name that any terminal takes, in one line: file names may hold bytes that are no text, and a damaged
    table's headings anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def some(names: Sequence[object]) -> str:
    """The first three, and how many more there are."""
    shown = ", ".join(printable(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def kinds(counts: Mapping[str, int]) -> str:
    """As "12 .json, 1 LICENSE", the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ordered) - 8} more kinds" if len(ordered) > 8 else ""
    return ", ".join(f"{count} {printable(kind)}" for kind, count in ordered[:8]) + more


def say(message: str) -> None:
    """A warning by Python's logging, on stderr where nothing else is set up; only the first process warns."""
    if os.environ.get("RANK", "0") == "0":
        _LOGGER.warning(message)
