"""Words that the demo experts were never told."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer

from .models import Model

__all__ = ["strange_words", "warn_of_strange_words"]


def strange_words(texts: Iterable[str]) -> list[str]:
    """Those that are in no caption the demo experts were trained with, each once."""
    from ..demo import known_words

    words = (word for text in texts for word in re.findall(r"[^\W\d_]{2,}", text.lower()))
    known = set(known_words())
    return [word for word in dict.fromkeys(words) if word not in known]


def warn_of_strange_words(model: Model, prompts: Sequence[str], negative: Any = None) -> None:
    """One line on standard error, if the model is the demo and there are any.

    negative: a text, or texts by expert.
    """
    if not model.is_demo:
        return
    negatives = negative.values() if isinstance(negative, Mapping) else [negative]
    strange = strange_words([*prompts, *filter(None, negatives)])
    if strange:
        what = f"this word: {strange[0]}" if len(strange) == 1 else f"these words: {', '.join(strange)}"
        typer.echo(f"warning: the demo experts don't know {what} (docs/DEMO.md lists theirs)", err=True)
