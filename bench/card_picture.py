"""A picture of a model's card, as a page shows it: made of the README.md that `save_pretrained` writes.

    python -m bench.card_picture OUT [--model FOLDER]

Without a folder, of the demo's pipeline, saved with two examples. Needs markdown-it-py (myst-parser brings
it), selenium, chromium and chromium-driver. Makes OUT/card.webp, and OUT/castles, which was saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.browser import chromium, photograph, resize

EXAMPLES = ("a castle by a lake, at night", "a castle with two towers, at dusk")
WIDTH, HEIGHT, SCALE = 760, 900, 1.5
STYLE = """
::-webkit-scrollbar {display: none}
body {font: 16px/1.5 sans-serif; color: #1f2328; margin: 0; padding: 24px 32px; background: white}
h1 {font-size: 28px; margin: 0 0 16px} h2 {font-size: 21px; margin: 24px 0 10px}
h1, h2 {border-bottom: 1px solid #d1d9e0; padding-bottom: 6px}
pre {background: #f6f8fa; padding: 12px; border-radius: 6px; font-size: 14px}
code {font-family: monospace} :not(pre) > code {background: #eff1f3; padding: 2px 5px; border-radius: 4px}
table {border-collapse: collapse} td, th {border: 1px solid #d1d9e0; padding: 6px 12px; font-weight: normal}
img {width: 256px; display: block}
"""


def page(card: str) -> str:
    """The card's HTML: its front matter is the Hub's to read, and no text."""
    from markdown_it import MarkdownIt

    _, _, text = card.removeprefix("---\n").partition("\n---\n")
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style><body>{body}"


def photograph_top(html: Path, picture: Path) -> None:
    """A page down to its second section."""
    with chromium(WIDTH, HEIGHT, SCALE) as browser:
        browser.get(html.resolve().as_uri())
        height = browser.execute_script("return document.querySelectorAll('h2')[1].offsetTop")
        resize(browser, WIDTH, height, SCALE)
        photograph(browser, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="a saved pipeline; default: the demo's is saved")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.model
    if folder is None:
        from moe_sampler import HybridPipeline
        from moe_sampler.demo import experts_path

        folder = options.out / "castles"
        HybridPipeline.from_pretrained(experts_path()).save_pretrained(folder, examples=EXAMPLES)
    html = folder / "card.html"
    html.write_text(page((folder / "README.md").read_text(encoding="utf-8")), encoding="utf-8")
    photograph_top(html, options.out / "card.webp")
    html.unlink()


if __name__ == "__main__":
    main()
