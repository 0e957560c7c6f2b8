"""Demo experts: a tiny Sol and Lune trained on procedurally drawn, captioned scenes."""

from pathlib import Path

__all__ = ["experts_path"]


def experts_path() -> Path:
    """The folder of the experts that ship with the package, in Stable Diffusion layout."""
    return Path(__file__).parent / "experts"
