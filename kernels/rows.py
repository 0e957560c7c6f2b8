"""The layout of a plan's table: one float32 row per solver step, read by `sampler_step_`.

    x0 = p·x + Σ_e (q_cond_e·output_e_cond + q_uncond_e·output_e_uncond), clamped to [−clip, clip]
    x ← a·x + b·x0 + d·x0_prev + n·z
    next_input_e = scale_e·x

This module is plain Python: planning needs neither torch nor a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

COLUMNS = (
    "p",
    "a",
    "b",
    "d",
    "n",
    "clip",
    "q_cond_0",
    "q_uncond_0",
    "q_cond_1",
    "q_uncond_1",
    "scale_0",
    "scale_1",
)
INDEX = {name: i for i, name in enumerate(COLUMNS)}

# 64 bytes: every row starts on a 16-byte boundary, so no step differs from another in alignment.
ROW_WIDTH = 16


def make_row(**columns: float) -> list[float]:
    """One row of `ROW_WIDTH` numbers from named columns; absent ones are 0, an absent `clip` is +inf.

    Raises a ValueError for an unknown column and for a value that no step can have.
    """
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown:
        raise ValueError(f"unknown column {unknown[0]!r}; the columns are {', '.join(COLUMNS)}")
    row = [0.0] * ROW_WIDTH
    row[INDEX["clip"]] = math.inf
    for name, value in columns.items():
        row[INDEX[name]] = float(value)
    check_row(row)
    return row


def check_row(row: Sequence[float]) -> None:
    """Raise a ValueError unless all of a row is finite, but for `clip`, which is in [0, ∞]."""
    at = INDEX["clip"]
    # NaN and infinities survive a sum, so a good row costs one pass.
    if math.isfinite(sum(row[:at]) + sum(row[at + 1 :])) and row[at] >= 0:
        return
    bad = [f"{n} = {v}" for n, v in zip(COLUMNS, row, strict=False) if n != "clip" and not math.isfinite(v)]
    if not row[at] >= 0:
        bad.append(f"clip = {row[at]}")
    raise ValueError(f"a row's coefficients must be finite and its clip at least 0, got {', '.join(bad)}")
