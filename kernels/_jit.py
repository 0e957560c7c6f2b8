"""Triton, imported when the first kernel is launched, and what kernels share."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def require_triton(device: torch.device) -> None:
    """Raise a ValueError that says what to do if Triton cannot run kernels on `device`."""
    if find_spec("triton") is None:
        raise ValueError("backend='triton' needs Triton: pip install triton, or use backend='torch'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs CUDA tensors, these are on {device}: move them to a GPU, "
            "use backend='torch', or set TRITON_INTERPRET=1 before starting Python for Triton's interpreter"
        )
