"""Measured parts of the documentation's pages."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PERFORMANCE", "PROMPTS", "renew", "renew_page"]

DOCS = Path(__file__).parents[1] / "docs"
PERFORMANCE, PROMPTS = DOCS / "PERFORMANCE.md", DOCS / "PROMPTS.md"


def renew(page: str, name: str, block: str) -> str:
    """The page with the text between two markers replaced.

    Raises a ValueError if the page has no such markers.
    """
    start, stop = f"<!-- measured: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = page.partition(start)
    _, ended, after = rest.partition(stop)
    if not (found and ended):
        raise ValueError(f"the page has no place marked {start} … {stop}")
    return f"{before}{start}\n\n{block}\n\n{stop}{after}"


def renew_page(page: Path, name: str, block: str) -> None:
    """`renew` on a page's file itself."""
    page.write_text(renew(page.read_text(encoding="utf-8"), name, block), encoding="utf-8")
