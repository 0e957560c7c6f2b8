"""The layout of a plan's table: one float32 row per solver step, read by `sampler_step_`.

    x0 = p·x + Σ_e (q_cond_e·output_e_cond + q_uncond_e·output_e_uncond), clamped to [−clip, clip]
    x ← a·x + b·x0 + d·x0_prev + n·z
    next_input_e = scale_e·x

This module is plain Python: planning needs neither torch nor a device.
"""

from __future__ import annotations

import math

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
    """One row of `ROW_WIDTH` numbers from named columns; absent ones are 0, an absent `clip` is +inf."""
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown:
        raise ValueError(f"unknown column {unknown[0]!r}; the columns are {', '.join(COLUMNS)}")
    row = [0.0] * ROW_WIDTH
    row[INDEX["clip"]] = math.inf
    for name, value in columns.items():
        row[INDEX[name]] = float(value)
    return row
