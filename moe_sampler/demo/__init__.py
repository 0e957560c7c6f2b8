"""Demo experts: a tiny Sol and Lune trained on procedurally drawn, captioned scenes, and their student."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["experts_path", "known_words", "student_path"]

_END = "</w>"


def experts_path() -> Path:
    """The folder of the experts that ship with the package, in Stable Diffusion layout."""
    return Path(__file__).parent / "experts"


def student_path() -> Path:
    """The folder of the TinyFlux that ships with the package. Its VAE and text encoder are the experts'."""
    return Path(__file__).parent / "student"


def known_words(experts: Path | None = None) -> list[str]:
    """The words that demo experts were told, sorted: those that their tokenizer keeps whole.

    Single letters, digits and signs, which are there to spell other words with, are not among them.

    Args:
        experts: their folder; default: those that ship.
    """
    vocabulary = (experts or experts_path()) / "tokenizer" / "vocab.json"
    tokens = json.loads(vocabulary.read_text(encoding="utf-8"))
    whole = (token.removesuffix(_END) for token in tokens if token.endswith(_END))
    return sorted(word for word in whole if len(word) > 1)
