"""Pictures a second of `generate --prompts`: one process, two processes, and two workers of Ray.

    python -m bench.rows --count 32 --steps 20

Every run makes the same files, which is checked. The rate is that of the pictures after the first: starting
Python and loading the models take as long for ten pictures as for a million, and stand beside it. Written to
bench/results/rows.csv and docs/PROMPTS.md; without Ray its row is left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.__main__ import environment_line
from bench.measure import environment
from bench.pages import PROMPTS, renew_page
from bench.report import RESULTS, markdown, write_csv

COLUMNS = ("run", "pictures_a_second", "seconds_until_the_first")
RUNS = {
    "one process": ([], []),
    "two processes": (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], []),
    "Ray, two workers": ([], ["--ray", "local", "--ray-workers", "2"]),
}


def measure(name: str, file: Path, folder: Path, options: list[str]) -> tuple[float, float]:
    """(Pictures a second after the first, seconds until the first)."""
    launcher, more = RUNS[name]
    command = ["-m", "moe_sampler.cli", "generate", "--prompts", str(file), "--output-dir", str(folder), "-q"]
    own = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    own |= {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
    started = time.time()
    subprocess.run([sys.executable, *launcher, *command, *options, *more], env=os.environ | own, check=True)
    times = sorted(path.stat().st_mtime for path in folder.glob("*.png"))
    return (len(times) - 1) / (times[-1] - times[0]), times[0] - started


def rows(count: int, steps: int, batch_size: int) -> list[dict[str, object]]:
    """One row a run, printed as soon as it is there.

    Raises a RuntimeError if a run made other files than the first.
    """
    options = ["--steps", str(steps), "--batch-size", str(batch_size)]
    shared = {"rows": count, "steps": steps, "batch_size": batch_size, **environment(), "threads": "1"}
    table: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        file, first = Path(scratch) / "prompts.txt", None
        file.write_text("a castle with two towers, at dusk\n" * count)
        for name in RUNS:
            if name.startswith("Ray") and find_spec("ray") is None:
                print(f"{name:18} not installed")
                continue
            folder = Path(scratch) / name
            rate, start = measure(name, file, folder, options)
            print(f"{name:18} {rate:9.2f} {start:14.1f} s", flush=True)
            made = {path.name: path.read_bytes() for path in folder.glob("*.png")}
            first = first or made
            if made != first:
                raise RuntimeError(f"{name} made other files")
            found: dict[str, object] = dict(zip(COLUMNS, (name, f"{rate:.2f}", f"{start:.1f}"), strict=True))
            table.append(found | shared)
    return table


def block(table: list[dict[str, object]]) -> str:
    """What the page shows of the rows."""
    row = table[0]
    asked = f"{row['rows']} rows, {row['steps']} steps, {row['batch_size']} at once"
    return f"{asked}; each process on {environment_line(table)}.\n\n{markdown(table, COLUMNS)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=32, help="rows")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()
    asked = f"{arguments.count} rows, {arguments.steps} steps, {arguments.batch_size} at once"
    print(f"{asked}; {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    print(f"{'':18} {'a second':>9} {'until the first':>16}")
    table = rows(arguments.count, arguments.steps, arguments.batch_size)
    write_csv(table, RESULTS / "rows.csv")
    renew_page(PROMPTS, "rows", block(table))


if __name__ == "__main__":
    main()
