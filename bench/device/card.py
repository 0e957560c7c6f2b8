"""The card, what runs on it, and its two ceilings as measured: memory and matrix products."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import torch

from bench.device.results import Results, Row, read
from bench.graphs import seconds_of
from bench.measure import DEVICE

__all__ = ["Ceilings", "ceilings", "measure"]

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy", "moe-sampler")


class Ceilings(NamedTuple):
    """copy: bytes read plus bytes written a second. product: FLOP a second, of bfloat16."""

    copy: float
    product: float


def measure(results: Results) -> None:
    results.attempt("card", lambda: [("card", _card())])
    results.attempt("copy", lambda: _copy(results.rehearsal))
    results.attempt("product", lambda: _product(results.rehearsal))


def ceilings(results: Results) -> Ceilings:
    """As the card's part found them, or else measured now."""
    tables = read(results.folder, "card").get("tables", {})
    rows = [*tables.get("ceilings", ())]
    if {row["ceiling"] for row in rows} != {"copy", "product"}:
        rows = [row for find in (_copy, _product) for _, row in find(results.rehearsal)]
    found = {row["ceiling"]: row["per_s"] for row in rows}
    return Ceilings(found["copy"], found["product"])


def _card() -> Row:
    row: Row = {"python": platform.python_version(), "cores": os.cpu_count()}
    for name in PACKAGES:
        try:
            row[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            row[name] = ""
    if DEVICE == "cpu":
        return {"name": "none, a rehearsal on a CPU", **row}
    card = torch.cuda.get_device_properties(0)
    return {
        "name": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_GiB": round(card.total_memory / 2**30, 1),
        "l2_MiB": round(card.L2_cache_size / 2**20, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        **row,
    }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown: no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def _copy(rehearsal: bool) -> Iterator[tuple[str, Row]]:
    """A copy far larger than any cache, of random bytes."""
    size = 2**22 if rehearsal else min(2**32, torch.cuda.mem_get_info()[0] // 8)
    source = torch.randint(0, 2**31 - 1, (size // 4,), dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), DEVICE)
    yield "ceilings", {"ceiling": "copy", "size": f"{source.nbytes / 2**20:.0f} MiB", "per_s": rate}


def _product(rehearsal: bool) -> Iterator[tuple[str, Row]]:
    """Of random matrices: zeros would take less power, and run faster than real data."""
    side = 256 if rehearsal else 8192
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in "ab")
    out = torch.empty_like(a)
    rate = 2 * side**3 / seconds_of(lambda: torch.mm(a, b, out=out), DEVICE)
    yield "ceilings", {"ceiling": "product", "size": f"{side}x{side}x{side} bfloat16", "per_s": rate}
