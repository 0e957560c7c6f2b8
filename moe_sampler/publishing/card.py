"""The card of a saved folder, its README.md: the hub's metadata, how it is loaded, pictures and licence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..loading.folders import CARD

__all__ = ["Example", "card_text", "is_ours", "license_in", "loading", "quoted", "table", "write_card"]

_MARK = "<!-- written by moe-sampler, which writes it anew unless this line is gone -->"


@dataclass(frozen=True)
class Example:
    """A picture in the folder, and what it was made of."""

    prompt: str
    file: str


def card_text(
    title: str,
    sections: Sequence[str],
    *,
    license: str | None,
    tags: Sequence[str] = (),
    examples: Sequence[Example] = (),
    **metadata: Any,
) -> str:
    """Markdown with the hub's metadata.

    Args:
        title: of the page.
        sections: Markdown, after the pictures.
        license: its identifier on the hub; None where nobody said.
        tags: beside moe-sampler's own.
        examples: pictures to show.
        metadata: more of the hub's, such as `library_name` and `pipeline_tag`.
    """
    from huggingface_hub import ModelCardData

    widget = [{"text": each.prompt, "output": {"url": each.file}} for each in examples]
    data = ModelCardData(license=license, tags=["moe-sampler", *tags], widget=widget or None, **metadata)
    parts = [f"---\n{data.to_yaml()}\n---", _MARK, f"# {title}"]
    if examples:
        shown = [f"![{_plain(each.prompt)}]({each.file})" for each in examples]
        parts.append("\n".join([f"| {' | '.join(shown)} |", "|---" * len(shown) + "|"]))
        parts[-1] += f"\n| {' | '.join(_plain(each.prompt) for each in examples)} |"
    parts += sections
    parts.append(
        f"## Licence\n\n{license}"
        if license
        else "## Licence\n\nNone was named when this was saved: that of what it was made from holds."
    )
    return "\n\n".join([*parts, "Made with moe-sampler."]) + "\n"


def loading(imports: str, lines: Sequence[str]) -> str:
    """Python to type, as a block."""
    return "\n".join(["```python", imports, "", *lines, "```"])


def quoted(text: str) -> str:
    """As Python has it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _plain(text: str) -> str:
    """Within a table and an image's description."""
    return " ".join("".join(" " if char in "[]|<>`" else char for char in text).split())


def table(rows: Mapping[str, Any]) -> str:
    """Two columns without a header."""

    def cell(value: Any) -> str:
        text = f"{value:.5g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    return "\n".join(["| | |", "|---|---|", *(f"| {cell(k)} | {cell(v)} |" for k, v in rows.items())])


def is_ours(card: Path) -> bool:
    """Whether nobody wrote or adopted it: it still has the line that says so."""
    try:
        return _MARK in card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def write_card(folder: Path, text: str, into: Path | None = None) -> None:
    """Write the card, unless there is one that isn't ours.

    folder: written to. into: where it will be, if that is another folder.
    """
    there = (folder if into is None else into) / CARD
    if not there.exists() or is_ours(there):
        (folder / CARD).write_text(text, encoding="utf-8")


def license_in(folder: Path) -> str | None:
    """What a folder's card names as its licence."""
    from huggingface_hub import metadata_load

    try:
        found = (metadata_load(folder / CARD) or {}).get("license")
    except Exception:  # a card is prose, which YAML's reader need not understand
        return None
    return found if isinstance(found, str) else None
