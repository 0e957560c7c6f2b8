"""What the demo's models were never told or shown: words that are in no caption, and other sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import typer

__all__ = ["size_note", "strange_words", "warn_of_limits", "word_note"]


def strange_words(texts: Iterable[str]) -> list[str]:
    """Those that are in no caption the demo's models were trained with, each once."""
    from ..demo import known_words

    words = (word for text in texts for word in re.findall(r"[^\W\d_]{2,}", text.lower()))
    known = set(known_words())
    return [word for word in dict.fromkeys(words) if word not in known]


def word_note(texts: Iterable[str]) -> str | None:
    """What to say of the words, if there are strange ones."""
    strange = strange_words(texts)
    if not strange:
        return None
    return f"the demo's models don't know {_these('word', strange)}: {', '.join(strange)}"


def size_note(sizes: Iterable[Mapping[str, Any]]) -> str | None:
    """What to say of pictures' sizes, if some are others than the models were trained on.

    sizes: `height` and `width` in pixels, where they are known.
    """
    from ..demo.drawing import SIZE

    asked = dict.fromkeys((size.get("width", SIZE), size.get("height", SIZE)) for size in sizes)
    others = [f"{width}x{height}" for width, height in asked if (width, height) != (SIZE, SIZE)]
    if not others:
        return None
    return (
        f"the demo's models were trained on {SIZE}x{SIZE} pixels alone; with {_these('size', others)} things "
        f"may come twice or be cut off: {', '.join(others)}"
    )


def _these(what: str, found: list[str]) -> str:
    return f"this {what}" if len(found) == 1 else f"these {what}s"


def warn_of_limits(
    prompts: Iterable[str], negatives: Iterable[Any] = (), sizes: Iterable[Mapping[str, Any]] = ()
) -> None:
    """Up to two lines on standard error, of a run with the demo's models.

    negatives: texts, or texts by expert, or None. sizes: as `size_note` takes them.
    """
    texts = list(prompts)
    for negative in negatives:
        texts += negative.values() if isinstance(negative, Mapping) else [negative]
    for note in (word_note(filter(None, texts)), size_note(sizes)):
        if note is not None:
            typer.echo(f"warning: {note} (docs/DEMO.md)", err=True)
