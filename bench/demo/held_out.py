"""Scenes that nothing was trained on, and the prompts that they give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_sampler.demo.captions import describe
from moe_sampler.demo.data import SceneSet
from moe_sampler.demo.scenes import Scene
from moe_sampler.demo.tokenizer import MAX_LENGTH

HELD_OUT_SCENES = 1000


@dataclass(frozen=True)
class HeldOut:
    """Held-out scenes: the first `count` give the prompts, the others the reference pictures."""

    scenes: SceneSet
    count: int = 300

    def prompts(self) -> tuple[list[str], list[dict[str, str]]]:
        """Captions that mention an attribute with probability 0.8, and what they mention."""
        rng = np.random.default_rng(5)
        pairs = [fitting_caption(self.scenes.scene(i), rng) for i in range(self.count)]
        return [text for text, _ in pairs], [said for _, said in pairs]


def fitting_caption(scene: Scene, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """`describe`, drawn again when it is too long for the text encoder."""
    while True:
        text, said = describe(scene, rng, keep=0.8)
        if len(text.replace(",", " ,").split()) <= MAX_LENGTH - 2:
            return text, said
