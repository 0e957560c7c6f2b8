"""The cases compiled ahead of time, in several processes: what each uses, and Triton's cache filled."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from bench import aot
from bench.cases import cases

__all__ = ["compile_cases", "most_warps", "resident_blocks"]

_USES = ("registers", "stack_bytes", "spills", "shared_bytes", "warps", "instructions")
_MULTIPROCESSOR = {
    80: (64, 32, 164),
    86: (48, 16, 100),
    89: (48, 24, 100),
    90: (64, 32, 228),
    100: (64, 32, 228),
    120: (48, 24, 100),
}
"""By architecture: warps, blocks and KiB of shared memory a multiprocessor (CUDA Programming Guide)."""


def compile_cases(names: Sequence[str], architecture: int, processes: int) -> dict[str, dict[str, Any] | str]:
    """By case, its numbers, or what went wrong."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _compile_for_real) as pool:
        futures = {name: pool.submit(_compile, name, architecture) for name in names}
        found = {}
        for name, future in futures.items():
            error = future.exception()
            found[name] = future.result() if error is None else f"{type(error).__name__}: {error}"
        return found


def _compile_for_real() -> None:
    """Before Triton is imported: not in its interpreter, where a rehearsal runs the kernels."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def _compile(name: str, architecture: int) -> dict[str, Any]:
    case = next(case for case in cases() if str(case) == name)
    code = aot.compile_launch(case.build(case.shape, "meta").launch, architecture)
    return {use: getattr(code, use) for use in _USES}


def most_warps(architecture: int) -> int:
    return _MULTIPROCESSOR[architecture][0]


def resident_blocks(registers: int, shared_bytes: int, warps: int, architecture: int) -> int:
    """Blocks that a multiprocessor holds at once.

    NVIDIA's occupancy rules: registers, 65,536 of them, are given to warps by 256, shared memory to blocks by
    128 bytes with 1 KiB beside their own.
    """
    warps_at_most, blocks_at_most, shared_kib = _MULTIPROCESSOR[architecture]
    registers_a_warp = -(-registers * 32 // 256) * 256
    shared = -(-(shared_bytes + 1024) // 128) * 128
    return min(
        blocks_at_most,
        warps_at_most // warps,
        65536 // (registers_a_warp * warps),
        shared_kib * 1024 // shared,
    )
