"""Plans that are brought along: from a file, from standard input, or from an image made by one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._readers import MOST_BYTES, read_regular
from .options import given_flags

if TYPE_CHECKING:
    from ..sampling.plan import SamplingPlan

__all__ = ["find_plan"]


def find_plan(path: Path | None, previous: Mapping[str, Any], *groups: Any) -> SamplingPlan | None:
    """The plan that a command is to run, if it is given one.

    Args:
        path: of its JSON, "-" for standard input; without it, that of the image before counts.
        previous: the settings of an image made before.
        groups: options that say what a plan decides.

    Raises:
        ValueError: no plan there, or options beside it.
    """
    if path is None and "plan" not in previous:
        return None
    flags = [flag for group in groups for flag in given_flags(group)]
    if flags:
        whose = "the image's plan" if path is None else "--plan"
        raise ValueError(f"{whose} decides what {' and '.join(flags)} would: leave out one or the other")
    from ..sampling.plan import SamplingPlan

    if path is None:
        return SamplingPlan.from_json(json.dumps(previous["plan"]))
    try:
        text = _standard_input() if str(path) == "-" else read_regular(path)
        return SamplingPlan.from_json(text)
    except ValueError as error:
        raise ValueError(f"--plan {path}: {error}") from None


def _standard_input() -> str:
    try:
        text = sys.stdin.read(MOST_BYTES + 1)
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8") from None
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES:,} characters")
    return text
