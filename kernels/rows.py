"""The layout of a plan's table: one float32 row per solver step, read by `sampler_step_`.

    x0 = p·x + Σ_e (q_cond_e·output_e_cond + q_uncond_e·output_e_uncond), clamped to [−clip, clip]
    x ← a·x + b·x0 + Σ_k d_k·memory_k + n·z
    the oldest memory ← keep_x·x + keep_x0·x0 + keep_n·z, of the x before
    next_input_e = scale_e·x

Up to four experts e at one level, and up to three memories k, newest first. A row that keeps nothing leaves
the memories as they are; what a row keeps is memory_0 for the rows after it.

This module is plain Python: planning needs neither torch nor a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_EXPERTS = 4
MOST_MEMORIES = 3

COLUMNS = (
    *("p", "a", "b", "n"),
    *("d_0", "d_1", "d_2"),
    *("keep_x", "keep_x0", "keep_n"),
    *(f"q_{kind}_{slot}" for slot in range(MOST_EXPERTS) for kind in ("cond", "uncond")),
    *(f"scale_{slot}" for slot in range(MOST_EXPERTS)),
    "clip",
)
INDEX = {name: i for i, name in enumerate(COLUMNS)}

_CLIP = INDEX["clip"]

# 96 bytes: every row starts on a 16-byte boundary, so no step differs from another in alignment.
ROW_WIDTH = 24


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
    at = _CLIP
    # NaN and infinities survive a sum, so a good row costs one pass.
    if row[at] >= 0 and math.isfinite(sum(row[:at])):
        return
    bad = [f"{n} = {v}" for n, v in zip(COLUMNS, row, strict=False) if n != "clip" and not math.isfinite(v)]
    if not row[at] >= 0:
        bad.append(f"clip = {row[at]}")
    raise ValueError(f"a row's coefficients must be finite and its clip at least 0, got {', '.join(bad)}")
