"""All measurements side by side:

    python -m bench                      # everything, a few minutes
    python -m bench "sampler step"       # one suite
    python -m bench --page               # from the files of the last time, without measuring

prints a table a suite, writes it to bench/results/*.md, *.csv and *.png, and renews docs/PERFORMANCE.md,
which shows of a long table what each provider came to.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import pipelines, plots, student_training, suites
from bench.measure import ENVIRONMENT, OURS, measure, table_rows
from bench.pages import PERFORMANCE, renew_page
from bench.report import RESULTS, markdown, read_csv, write_csv

Rows = list[dict[str, object]]
SHORT = 12  # rows that a page can show
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
    threads = f"{row['threads']} thread{'' if row['threads'] == '1' else 's'}"
    return f"{row['machine']}, {threads}, {versions}"


def _lost(row: dict[str, object]) -> bool:
    return row["provider"] != OURS and float(str(row.get("times_ours", 1))) < 1


def _whole(rows: Rows) -> str:
    """All of a suite but the columns that every row shares, in Markdown."""
    names = [name for name in rows[0] if name not in ("suite", "rounds", "p20_us", "p80_us", *ENVIRONMENT)]
    return markdown(rows, names)


def _came_to(rows: Rows) -> str:
    """A row for each provider of each kind of work (a suite's first column): its least and its most."""
    kind = list(rows[0])[1] if list(rows[0])[1] not in ("shape", "layers") else None
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["provider"] != OURS:
            key = str(row[kind]) if kind else "", str(row["provider"])
            found.setdefault(key, []).append(float(str(row["times_ours"])))
    table = [
        {
            **({kind: work} if kind else {}),
            "provider": provider,
            "comparisons": len(times),
            "times ours, least": f"{min(times):.2f}",
            "median": f"{statistics.median(times):.2f}",
            "most": f"{max(times):.2f}",
        }
        for (work, provider), times in found.items()
    ]
    return markdown(table, list(table[0]))


def _block(rows: Rows) -> str:
    """What docs/PERFORMANCE.md shows of a suite."""
    parts = [f"{environment_line(rows)}.", _whole(rows) if len(rows) <= SHORT else _came_to(rows)]
    if "times_ours" in rows[0]:
        count = sum(row["provider"] != OURS for row in rows)
        parts.append(f"Slower than another provider in {sum(map(_lost, rows))} of {count} comparisons.")
    if len(rows) > SHORT:
        name = f"{_stem(rows).name}.md"
        parts[-1] += f" All of them: [bench/results/{name}](../bench/results/{name})."
    return "\n\n".join(parts)


def _stem(rows: Rows) -> Path:
    return RESULTS / str(rows[0]["suite"]).replace(" ", "_")


def _write(rows: Rows) -> None:
    """A suite's tables: the whole one beside its CSV file, and its part of the page."""
    suite = str(rows[0]["suite"])
    if len(rows) > SHORT:
        text = f'# {suite.capitalize()}\n\n{environment_line(rows)}. Made by `python -m bench "{suite}"`.\n\n'
        _stem(rows).with_suffix(".md").write_text(f"{text}{_whole(rows)}\n", encoding="utf-8")
    renew_page(PERFORMANCE, suite, _block(rows))


def _read(suite: str) -> Rows:
    return [dict(row) for row in read_csv(RESULTS / f"{suite.replace(' ', '_')}.csv")]


def main(arguments: Sequence[str] | None = None) -> None:
    names = [*suites.SUITES, *WHOLE]
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the suites named, or all.")
    parser.add_argument("suite", nargs="*", help=", ".join(names))
    parser.add_argument("--page", action="store_true", help="renew the page from the files, measure nothing")
    options = parser.parse_args(arguments)
    chosen = options.suite or names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}: use {', '.join(names)}")
    if options.page:
        for suite in chosen:
            _write(_read(suite))
        return
    # A table is unreadable in a pipe's 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    for suite in chosen:
        rows = measured(suite)
        show(rows, console)
        stem = _stem(rows)
        write_csv(rows, stem.with_suffix(".csv"))
        plots.draw(rows, stem.with_suffix(".png"))
        _write(rows)
        console.print(f"written: {stem}.csv, {stem}.png")


if __name__ == "__main__":
    main()
