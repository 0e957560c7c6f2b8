"""All measurements side by side:

    python -m bench                      # everything, a few minutes
    python -m bench "sampler step"       # one suite

prints a table a suite, writes bench/results/*.csv and *.png, and renews the measured tables in
docs/PERFORMANCE.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import pipelines, plots, student_training, suites
from bench.measure import ENVIRONMENT, OURS, measure, table_rows
from bench.pages import renew
from bench.report import RESULTS, markdown, write_csv

PERFORMANCE = Path(__file__).parents[1] / "docs" / "PERFORMANCE.md"
Rows = list[dict[str, object]]
WHOLE = {module.SUITE: module.rows for module in (pipelines, student_training)}
"""Suites that measure more than the time of a call."""


def measured(suite: str) -> Rows:
    """The rows of one suite."""
    if suite in WHOLE:
        return WHOLE[suite]()
    comparisons = list(suites.SUITES[suite]())
    console = Console(stderr=True)
    return [
        row
        for comparison in track(comparisons, description=suite, console=console)
        for row in table_rows(comparison, measure(comparison))
    ]


def show(rows: Rows, console: Console) -> None:
    """A table without the columns that all rows share; where ours is slower, the row is red."""
    names = [name for name in rows[0] if name not in ("suite", *ENVIRONMENT)]
    table = Table(title=str(rows[0]["suite"]), caption=environment_line(rows))
    for name in names:
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in names), style="red" if _lost(row) else "")
    console.print(table)


def environment_line(rows: Rows) -> str:
    row = rows[0]
    versions = ", ".join(f"{name} {row[name]}" for name in ENVIRONMENT[2:])
    return f"{row['machine']}, {row['threads']} threads, {versions}"


def _lost(row: dict[str, object]) -> bool:
    return row["provider"] != OURS and float(str(row.get("times_ours", 1))) < 1


def _block(rows: Rows) -> str:
    """What docs/PERFORMANCE.md shows of a suite."""
    names = [name for name in rows[0] if name not in ("suite", "rounds", "p20_us", "p80_us", *ENVIRONMENT)]
    lost = [row for row in rows if _lost(row)]
    parts = [f"{environment_line(rows)}.", markdown(rows, names)]
    if "times_ours" in rows[0]:
        count = sum(row["provider"] != OURS for row in rows)
        parts.append(f"Slower than another provider in {len(lost)} of {count} comparisons.")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    names = [*suites.SUITES, *WHOLE]
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the suites named, or all.")
    parser.add_argument("suite", nargs="*", help=", ".join(names))
    chosen = parser.parse_args(arguments).suite or names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}: use {', '.join(names)}")
    # A table is unreadable in a pipe's 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    for suite in chosen:
        rows = measured(suite)
        show(rows, console)
        stem = RESULTS / suite.replace(" ", "_")
        write_csv(rows, stem.with_suffix(".csv"))
        plots.draw(rows, stem.with_suffix(".png"))
        page = PERFORMANCE.read_text(encoding="utf-8")
        PERFORMANCE.write_text(renew(page, suite, _block(rows)), encoding="utf-8")
        console.print(f"written: {stem}.csv, {stem}.png")


if __name__ == "__main__":
    main()
