"""The demo's drawn scenes as a source."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from .samples import CaptionedImage

__all__ = ["DemoScenes"]


class DemoScenes:
    """`count` of the demo's procedurally drawn scenes with captions, from seed `first`."""

    def __init__(self, count: int, first: int = 0) -> None:
        if count < 1 or first < 0:
            raise ValueError(f"count must be at least 1 and first at least 0, got {count} and {first}")
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> CaptionedImage:
        seed = self._seed(index)
        # Streams 0 to 2 of a scene's seed draw it.
        text = self.caption(index, np.random.default_rng([seed, 3]))
        return CaptionedImage(f"scene {seed}", self._draw(seed), text)

    def caption(self, index: int, generator: np.random.Generator) -> str:
        """Another caption of the same scene, in the generator's words."""
        from ..demo.captions import caption
        from ..demo.scenes import draw_scene

        return caption(draw_scene(self._seed(index)), generator)

    def structure(self, index: int) -> Image.Image:
        """The scene's flat masses, without texture."""
        return self._draw(self._seed(index), structure=True)

    def _seed(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.first + index

    def _draw(self, seed: int, structure: bool = False) -> Image.Image:
        from ..demo.scenes import draw_scene, render

        return Image.fromarray(render(draw_scene(seed), structure))

    def describe(self) -> dict[str, Any]:
        return {"kind": "demo scenes", "first": self.first}
