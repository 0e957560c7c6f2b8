"""Every kernel compiled ahead of time and inspected, without a GPU:

    python -m bench.report

compiles for sm_80, sm_90 and sm_100, counts the bytes of a small launch in Triton's interpreter, prints a
table and writes bench/results/kernels.csv and kernels.md.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import triton
from rich.progress import track

from bench import aot
from bench.cases import cases
from bench.cases.case import Built, Case
from bench.roofline import BY_ARCHITECTURE, bytes_moved, seconds
from bench.traffic import count_traffic

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "operation",
    "variant",
    "dtype",
    "architecture",
    "registers",
    "stack_bytes",
    "spills",
    "shared_bytes",
    "load_bits",
    "store_bits",
    "instructions",
    "loop_instructions",
    "bytes_per_element",
    "minimum_bytes_per_element",
    "reads",
    "size",
    "blocks",
    "megabytes",
    "cache_megabytes",
    "device",
    "roofline_us",
    "limit",
)


def counted_bytes(built: Built) -> tuple[int, int, float]:
    """(bytes moved, the least that any kernel must move, how often a cached byte is read) of a launch.

    Needs the interpreter. Operands that are streamed count every access; cached ones their first.
    """
    traffic = count_traffic(built.launch)
    of = {id(t): traffic[i] for i, t in enumerate(built.launch.args) if isinstance(t, torch.Tensor)}
    shared = sum(of[id(t)].distinct_read for t in built.cached)
    moved = sum(of[id(t)].read for t in built.read) + sum(of[id(t)].written for t in built.written) + shared
    least = sum(t.nbytes for t in (*built.read, *built.written)) + shared
    return moved, least, sum(of[id(t)].read for t in built.cached) / shared if shared else 1.0


def _count_all() -> None:
    json.dump([counted_bytes(case.build(case.small, "cpu")) for case in cases()], sys.stdout)


def _traffic() -> list[tuple[int, int, float]]:
    """`counted_bytes` of every case, from a process in which Triton interprets."""
    command = [sys.executable, "-c", "from bench.report import _count_all; _count_all()"]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def _widths(counts: dict[int, int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in sorted(counts.items(), reverse=True))


def _row(case: Case, built: Built, architecture: int, counted: tuple[int, int, float]) -> dict[str, object]:
    code = aot.compile_launch(built.launch, architecture)
    device = BY_ARCHITECTURE[architecture]
    time, limit = seconds(built, code, case.dtype, device)
    elements = torch.Size(case.small).numel()
    moved, least, reread = counted
    return dict(
        zip(
            COLUMNS,
            (
                case.operation,
                case.variant,
                str(case.dtype).removeprefix("torch."),
                f"sm_{architecture}",
                code.registers,
                code.stack_bytes,
                code.spills,
                code.shared_bytes,
                _widths(code.global_loads),
                _widths(code.global_stores),
                code.instructions,
                code.loop_instructions or "",
                f"{moved / elements:.3f}",
                f"{least / elements:.3f}",
                f"{reread:.0f}",
                "x".join(map(str, case.shape)),
                built.launch.grid[0],
                f"{bytes_moved(built) / 1e6:.2f}",
                f"{built.asked / 1e6:.0f}" if built.asked else "",
                device.name,
                f"{time * 1e6:.2f}",
                limit,
            ),
            strict=True,
        )
    )


def rows() -> list[dict[str, object]]:
    """One row a kernel, dtype and architecture."""
    todo = [
        (case, case.build(case.shape, "meta"), architecture, counted)
        for case, counted in zip(cases(), _traffic(), strict=True)
        for architecture in aot.ARCHITECTURES
    ]
    return [_row(*item) for item in track(todo, description="compiling", console=_stderr())]


def _stderr():
    from rich.console import Console

    return Console(stderr=True)


def markdown(table: Sequence[Mapping[str, object]], columns: Iterable[str] = COLUMNS) -> str:
    """A Markdown table of the named columns."""
    columns = list(columns)
    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    lines += ["| " + " | ".join(str(row[name]) for name in columns) + " |" for row in table]
    return "\n".join(lines)


def write_csv(table: Sequence[dict[str, object]], path: Path) -> None:
    """All columns of a table."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows that `write_csv` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


PAGE = """# Kernels, as compiled

Made by `python -m bench.report` with torch {torch} and Triton {triton}; nothing here was run on a GPU.

Accesses are counts × width in bits; 32- and 64-bit loads are rows, levels and seeds that a whole program
shares. Instructions are those in the code, a loop's once, and loop instructions those of the longest
innermost loop. Blocks are programs. Cache megabytes are what programs ask of the cache, where they ask for
the same operands again and again. Bytes per element are counted in Triton's interpreter on a small launch,
every access through its mask; `reads` is how often, on that small launch, a byte of a small shared operand is
asked for: first from memory, then from cache. The roofline is the longest of memory, instruction issue,
matrix products and exponentials at the stated size and the data sheet's peaks; launch latency comes on top.

{tables}
"""


def page(table: Sequence[dict[str, object]]) -> str:
    """The Markdown page: a table an operation."""
    columns = [name for name in COLUMNS if name not in ("operation", "architecture")]
    sections = [
        f"## `{operation}`\n\n" + markdown([row for row in table if row["operation"] == operation], columns)
        for operation in dict.fromkeys(row["operation"] for row in table)
    ]
    return PAGE.format(torch=torch.__version__, triton=triton.__version__, tables="\n\n".join(sections))


def main() -> None:
    table = rows()
    write_csv(table, RESULTS / "kernels.csv")
    (RESULTS / "kernels.md").write_text(page(table), encoding="utf-8")
    print(markdown(table))
    print(f"\nwritten: {RESULTS / 'kernels.csv'}, {RESULTS / 'kernels.md'}")


if __name__ == "__main__":
    main()
