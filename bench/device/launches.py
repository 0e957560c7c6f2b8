"""Every launch of the ahead-of-time cases on the card: is it right, how long it takes, what it uses."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor

from bench.cases import cases
from bench.cases.case import Built, Case, Tensors
from bench.device import calls
from bench.device.card import Ceilings, ceilings
from bench.device.compiled import compile_cases, most_warps, resident_blocks
from bench.device.results import Results, Row
from bench.device.twins import FORMULAS, LONG_SUMS, named_arguments, prepare
from bench.graphs import recorded, seconds_of
from bench.measure import DEVICE
from bench.roofline import bytes_moved
from bench.tolerance import error_and_allowance

__all__ = ["Operands", "check", "measure"]

_SETS = 64  # of operands at most, that are used in turn


class Operands(Tensors):
    """Fresh random ones: levels, weights and rows in (0, 1), and N(0, 1) where there are more dimensions."""

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        if len(shape) < 3 or not dtype.is_floating_point:
            return super().__call__(shape, dtype)
        return torch.randn(shape, device=self.device).to(dtype)


def measure(results: Results) -> None:
    todo = _rehearsed(cases()) if results.rehearsal else cases()
    limits = ceilings(results)
    architecture = 90 if DEVICE == "cpu" else _architecture()
    processes = 1 if results.rehearsal else max(1, min(14, (os.cpu_count() or 2) - 1))
    named = [str(case) for case in todo]
    uses: dict[str, Row] = {}

    def compiling() -> Iterator[tuple[str, Row]]:
        found = compile_cases(named[:2] if results.rehearsal else named, architecture, processes)
        uses.update({name: use for name, use in found.items() if not isinstance(use, str)})
        wrong = {name: text for name, text in found.items() if isinstance(text, str)}
        yield "compiled", {"cases": len(found), "processes": processes, "architecture": architecture}
        if wrong:
            raise RuntimeError(f"{len(wrong)} of {len(found)} do not compile: {wrong}")

    results.attempt("compile", compiling, limit=90)
    for i, case in enumerate(todo):
        timed = not results.rehearsal or i < 3  # the interpreter takes its time
        shape = case.small if results.rehearsal else case.shape
        results.attempt(
            str(case),
            lambda case=case, shape=shape, timed=timed: _launch(
                case, shape, uses, limits, architecture, timed
            ),
        )
    for name, make in calls.public_calls(small=results.rehearsal):
        results.attempt(f"calls of {name}", lambda name=name, make=make: [("calls", calls.row(name, make()))])


def _architecture() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _rehearsed(every: list[Case]) -> list[Case]:
    """Each use once, in float32 or float16: Triton's interpreter, which runs them, truncates bfloat16."""
    uses = dict.fromkeys((case.operation, case.variant) for case in every)
    dtypes = dict(zip(uses, itertools.cycle((torch.float32, torch.float16)), strict=False))
    dtypes["shift_sigmas", ""] = torch.float32  # its only one
    return [case for case in every if case.dtype == dtypes[case.operation, case.variant]]


def _launch(
    case: Case,
    shape: tuple[int, ...],
    uses: dict[str, Row],
    limits: Ceilings,
    architecture: int,
    timed: bool,
) -> Iterator[tuple[str, Row]]:
    verdict = check(case.make(Operands(DEVICE), shape, case.dtype))
    row: Row = {
        "operation": case.operation,
        "variant": case.variant,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": "x".join(map(str, shape)),
        **verdict,
    }
    sizes = case.make(Tensors("meta"), shape, case.dtype)
    if timed:
        seconds, moved = _seconds(case, shape), bytes_moved(sizes)
        row |= {
            "us": seconds * 1e6,
            "GB_per_s": moved / seconds / 1e9,
            "of_copy": moved / seconds / limits.copy,
        }
        if sizes.flops and case.dtype != torch.float32:
            row["of_product"] = sizes.flops / seconds / limits.product
    used = uses.get(str(case))
    if used is not None:
        resident = resident_blocks(used["registers"], used["shared_bytes"], used["warps"], architecture)
        row |= used | {"blocks": sizes.launch.grid[0], "resident_blocks": resident}
        row["occupancy"] = resident * used["warps"] / most_warps(architecture)
    yield "launches", row
    if not verdict["error"] < verdict["allowed"]:
        raise AssertionError(
            "{worst}: error {error:.3g}, allowed {allowed:.3g}, {unwritten} unwritten".format(**verdict)
        )


def check(built: Built) -> Row:
    """Run the launch once over outputs full of NaN and compare all it wrote with a float64 twin, by the rule.

    Returns the error and what is allowed of the result that comes closest to its limit or goes beyond it, and
    how many elements hold no finite number.
    """
    kernel = built.launch.kernel.__name__
    arguments = named_arguments(built.launch)
    prepare(kernel, arguments)
    inputs = {id(t) for t in (*built.read, *built.cached)}
    for tensor in built.written:
        if id(tensor) not in inputs:
            tensor.fill_(torch.nan)
    before = {name: v.clone() if isinstance(v, Tensor) else v for name, v in arguments.items()}
    built.launch.run(built.written[0].device)
    exact = {name: v.double() if _is_float(v) else v for name, v in before.items()}
    references, eagers = FORMULAS[kernel](exact), FORMULAS[kernel](before)
    outputs = {name: v for name, v in arguments.items() if any(v is t for t in built.written)}
    verdicts = []
    for name, result in outputs.items():
        cap = 2e-5 if name in LONG_SUMS else 2e-6
        eager, reference = eagers[name].to(result.dtype), references[name]
        error, allowed = error_and_allowance(result, eager, reference, cap)
        unwritten = int((~torch.isfinite(result)).sum())
        verdicts.append({"worst": name, "error": error, "allowed": allowed, "unwritten": unwritten})
    return max(verdicts, key=_closeness)


def _closeness(verdict: Row) -> float:
    """Error over what is allowed; infinite where one of them is no number."""
    share = verdict["error"] / verdict["allowed"]
    return math.inf if math.isnan(share) else share


def _is_float(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _seconds(case: Case, shape: tuple[int, ...]) -> float:
    """Of one launch, from a graph of launches over so many operands that none finds its own in the cache."""
    size = bytes_moved(case.make(Tensors("meta"), shape, case.dtype))
    cache = 0 if DEVICE == "cpu" else torch.cuda.get_device_properties(0).L2_cache_size
    sets = max(2, min(_SETS, 3 * cache // size + 1))
    every = [case.make(Operands(DEVICE), shape, case.dtype) for _ in range(sets)]
    device = every[0].written[0].device

    def launches() -> None:
        for built in every:
            built.launch.run(device)

    return seconds_of(recorded(launches, DEVICE), DEVICE) / sets
