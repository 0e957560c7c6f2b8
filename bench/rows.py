"""Pictures a second of `generate --prompts`: one process, two processes, and two workers of Ray.

    python -m bench.rows --count 32 --steps 20

Every run makes the same files, which is checked. The rate is that of the pictures after the first: starting
Python and loading the models take as long for ten pictures as for a million, and stand beside it.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=32, help="rows")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()
    options = ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size)]
    versions = f"torch {torch.__version__}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    print(f"{arguments.count} rows, {' '.join(options)}; {platform.machine()}, {versions}")
    print(f"{'':18} {'a second':>9} {'until the first':>16}")
    with tempfile.TemporaryDirectory() as scratch:
        file, first = Path(scratch) / "prompts.txt", None
        file.write_text("a castle with two towers, at dusk\n" * arguments.count)
        for name in RUNS:
            if name.startswith("Ray") and find_spec("ray") is None:
                print(f"{name:18} not installed")
                continue
            folder = Path(scratch) / name
            rate, start = measure(name, file, folder, options)
            print(f"{name:18} {rate:9.2f} {start:14.1f} s", flush=True)
            made = {path.name: path.read_bytes() for path in folder.glob("*.png")}
            first = first or made
            assert made == first, f"{name} made other files"


if __name__ == "__main__":
    main()
