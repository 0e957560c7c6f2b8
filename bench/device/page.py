"""docs/GPU.md's tables, from a folder of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.device import PARTS
from bench.device.results import Row, read
from bench.pages import renew
from bench.report import markdown

__all__ = ["BLOCKS", "PAGE", "blocks", "write"]

PAGE = Path(__file__).parents[2] / "docs" / "GPU.md"
BLOCKS = ("status", "card", "tests", "launches", "calls", "images", "student", "failures")
"""The places that docs/GPU.md has for them."""
NOTHING = "Nothing measured yet."
_HIDDEN = {"suite", "rounds", "p20_us", "p80_us", "machine", "threads", "torch", "diffusers", "numpy"}


def write(folder: Path, path: Path = PAGE) -> None:
    """Renew the page's measured places.

    Raises:
        ValueError: results of a rehearsal, or none.
    """
    found = {part: read(folder, part) for part in PARTS}
    if not any(found.values()):
        raise ValueError(f"{folder} holds no results: python -m bench.device {folder}")
    if any(part.get("rehearsal") for part in found.values()):
        raise ValueError(f"{folder} holds a rehearsal, which says nothing about a GPU")
    text = path.read_text(encoding="utf-8")
    for name, block in blocks(found).items():
        text = renew(text, name, block)
    path.write_text(text, encoding="utf-8")


def blocks(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What the page shows, by place; found: every part's results."""
    tables: dict[str, list[Row]] = {}
    for part in found.values():
        tables |= part.get("tables", {})
    student = [
        tables[name] for name in ("student", "attention statistics", "student training") if name in tables
    ]
    return {
        "status": _status(found, tables),
        "card": _card(tables),
        "tests": _table(tables.get("tests", ())),
        "launches": _launches(tables.get("launches", ())),
        "calls": _table(tables.get("calls", ())),
        "images": _images(tables),
        "student": "\n\n".join(map(_table, student)) or NOTHING,
        "failures": _failures(found),
    }


def _status(found: Mapping[str, Mapping[str, Any]], tables: Mapping[str, Sequence[Row]]) -> str:
    if not tables:
        return NOTHING
    card = tables["card"][0] if "card" in tables else {"name": "a GPU"}
    states = ", ".join(f"{part} {results['status']}" for part, results in found.items() if results)
    return f"Measured on {card['name']}: {states}."


def _card(tables: Mapping[str, Sequence[Row]]) -> str:
    if "card" not in tables:
        return NOTHING
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in tables["card"][0].items()]
    for row in tables.get("ceilings", ()):
        rate = f"{row['per_s'] / 1e12:.2f} {'TB/s' if row['ceiling'] == 'copy' else 'TFLOP/s'}"
        lines.append(f"- measured {row['ceiling']}, {row['size']}: {rate}")
    return "\n".join(lines)


_SHARE: Callable[[float], str] = "{:.0%}".format
_FORMATS: Mapping[str, Callable[[Any], str]] = {
    "error": "{:.2g}".format,
    "allowed": "{:.2g}".format,
    "us": "{:.2f}".format,
    "GB_per_s": "{:.0f}".format,
    "of_copy": _SHARE,
    "of_product": _SHARE,
    "occupancy": _SHARE,
    "images_per_s": "{:.2f}".format,
    "step_ms": "{:.2f}".format,
    "beside_steps_ms": "{:.1f}".format,
    "unet_ms": "{:.2f}".format,
    "outside_models": "{:.1%}".format,
    "difference": "{:.2g}".format,
    "peak_MiB": lambda value: f"{float(value):.0f}",
}


def _table(rows: Sequence[Row], names: Sequence[str] | None = None) -> str:
    """A Markdown table; a column for every name that a row has, blank where one has it not."""
    if not rows:
        return NOTHING
    every = names or [name for name in dict.fromkeys(n for row in rows for n in row) if name not in _HIDDEN]

    def cell(row: Row, name: str) -> str:
        value = row.get(name)
        return "" if value is None or value == "" else _FORMATS.get(name, str)(value)

    return markdown([{name: cell(row, name) for name in every} for row in rows], every)


def _launches(rows: Sequence[Row]) -> str:
    columns = (
        "variant",
        "dtype",
        "shape",
        "worst",
        "error",
        "allowed",
        "us",
        "GB_per_s",
        "of_copy",
        "of_product",
    )
    columns += ("registers", "shared_bytes", "spills", "warps", "blocks", "occupancy")
    parts = []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        own = [row for row in rows if row["operation"] == operation]
        wanted = [name for name in columns if any(row.get(name) not in (None, "") for row in own)]
        parts.append(f"`{operation}`\n\n{_table(own, wanted)}")
    return "\n\n".join(parts) or NOTHING


def _images(tables: Mapping[str, Sequence[Row]]) -> str:
    """With the UNet's own time a step beside that of the provider."""
    alone = {row["batch"]: row["unet_ms"] for row in tables.get("unet", ())}
    rows = [{**row, "unet_ms": alone.get(row["batch"])} for row in tables.get("images", ())]
    return _table(sorted(rows, key=lambda row: row["batch"]))


def _failures(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for part, results in found.items():
        for label, text in results.get("failures", {}).items():
            last = (text.strip().splitlines() or [""])[-1]
            lines.append(f"- {part}, {label}: `{last}`")
        lines += [f"- {part}, {label}: not reached in time" for label in results.get("not_reached", ())]
    return "\n".join(lines) or ("None." if any(found.values()) else NOTHING)
