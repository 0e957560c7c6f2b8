"""What a source of captioned images is."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from PIL import Image

__all__ = ["CaptionedImage", "Source"]


class CaptionedImage(NamedTuple):
    """key: what errors call it. image: RGB, as large as it came. caption: may be empty."""

    key: str
    image: Image.Image
    caption: str


class Source(Protocol):
    """Any sequence of captioned images; implement it to bring your own."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CaptionedImage:
        """The same image and caption every time."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON that changes when the data do: kind, and a fingerprint where there are files."""
        ...
