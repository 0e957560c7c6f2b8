"""Contact sheets: the pictures of docs/DEMO.md.

`python -m bench.demo.sheet FOLDER` writes them with the experts that ship.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moe_sampler.demo.captions import EXAMPLE_PROMPTS
from moe_sampler.demo.data import HELD_OUT_FIRST
from moe_sampler.demo.scenes import KINDS, draw_scene, render
from moe_sampler.viewing.sheets import INK, Sheet, scalable_font, wrapped

GAP = 6
LABEL = 150
HEADER = 22


def contact_sheet(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[np.ndarray]]], scale: int = 2
) -> Image.Image:
    """A labelled grid.

    Args:
        columns: headings.
        rows: (label, one uint8 [H, W, 3] picture a column).
        scale: whole-number enlargement, without smoothing.
    """
    height, width = (scale * side for side in rows[0][1][0].shape[:2])
    left = GAP + (LABEL if any(text for text, _ in rows) else 0)
    margins = (left, HEADER, GAP, 2 * GAP)
    sheet = Sheet(len(columns), len(rows), (width, height), gap=GAP, margins=margins, background="white")
    font = scalable_font(12)
    for i, text in enumerate(columns):
        sheet.heading(i, HEADER // 2, text, font)
    for j, (text, pictures) in enumerate(rows):
        place = (GAP, sheet.corner(0, j)[1] + 4)
        sheet.draw.multiline_text(place, wrapped(text, 22), fill=INK, font=font)
        for i, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), i, j, smooth=False)
    return sheet.image


def data_sheet(count: int = 6) -> Image.Image:
    """Renders of every kind, each with its structure-only version below."""
    rows = []
    for kind in KINDS:
        scenes = [draw_scene(HELD_OUT_FIRST + 40 + i, kind) for i in range(count)]
        rows += [(f"{kind}, full", [render(scene) for scene in scenes])]
        rows += [(f"{kind}, structure", [render(scene, structure=True) for scene in scenes])]
    return contact_sheet([""] * count, rows)


def comparison_sheet(
    pipe, prompts: Sequence[str] = EXAMPLE_PROMPTS, seed: int = 0, **settings
) -> Image.Image:
    """Sol alone, Lune alone, naive handoff and hybrid, from the same noise."""
    from bench.demo.evaluate import STEPS, generate

    titles = {"sol": "Sol alone", "lune": "Lune alone", "naive": "naive handoff", "hybrid": "hybrid"}
    made = {method: generate(pipe, method, list(prompts), seed, STEPS, **settings) for method in titles}
    rows = [(prompt, [made[method][i] for method in titles]) for i, prompt in enumerate(prompts)]
    return contact_sheet(list(titles.values()), rows)


def main(folder: Path) -> None:
    """Write demo_scenes.png and demo_comparison.png into `folder`."""
    from moe_sampler import HybridPipeline
    from moe_sampler.demo import experts_path

    pipe = HybridPipeline.from_pretrained(experts_path())
    pipe.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    data_sheet().save(folder / "demo_scenes.png", optimize=True)
    comparison_sheet(pipe).save(folder / "demo_comparison.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
