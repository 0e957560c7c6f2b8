"""Make an image with the model that `bench.make_random_sd15` wrote, and print time and peak memory.

`python -m bench.peak_memory FOLDER --offload expert --dtype bfloat16`
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from bench.make_random_sd15 import EXPERTS
from moe_sampler import HybridPipeline


def peak_memory() -> float:
    """The most this process ever had resident, in GB, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError("this system doesn't say how much memory a process used")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--offload", default="expert", help="none, expert or model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=512)
    options = parser.parse_args()
    experts = {name: options.folder / file for name, file in EXPERTS.items()}
    start = time.perf_counter()
    pipe = HybridPipeline.from_pretrained(
        options.folder / "base", **experts, dtype=getattr(torch, options.dtype), offload=options.offload
    )
    loaded = time.perf_counter()
    size = dict(height=options.size, width=options.size)
    output = pipe("a castle", seed=0, num_inference_steps=options.steps, **size)
    made = time.perf_counter()
    print(f"experts at work: {', '.join(output.plan.experts)}; image of {output.images[0].size}")
    print(f"loading {loaded - start:.1f} s, image {made - loaded:.1f} s, peak memory {peak_memory():.2f} GB")


if __name__ == "__main__":
    main()
