"""Linear layers that use the CPU's fastest matrix product.

On CPUs torch gives float32 products to MKL, which keeps to AVX2 on processors that aren't Intel's. oneDNN,
which torch also ships, uses all of their vector units: about twice as fast on an AMD Zen 5, and slower by a
quarter on an Intel Xeon. Everywhere else these are torch's own layers.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Linear", "linear"]

# oneDNN lays the weight out anew in every call, which few rows don't repay. These are a sample's
# rows, so that the choice doesn't depend on the batch.
_FEWEST_ROWS = 16


@cache
def mkl_keeps_to_avx2() -> bool:
    """Whether the processor is one of another maker than MKL's."""
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "vendor_id" in about and "GenuineIntel" not in about


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weightᵀ + bias; x: [..., I], weight: [O, I], float32 on the CPU, of any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )

    @staticmethod
    @once_differentiable  # which has no annotations
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        dx = None if weight is None else _product(grad, weight.t())
        dweight = None if x is None else _product(rows.t(), x.flatten(0, -2).t())
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None


class Linear(nn.Linear):
    """`torch.nn.Linear`, with float32 products of many rows by oneDNN on CPUs where MKL is the slower."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._use_onednn(input):
            return F.linear(input, self.weight, self.bias)
        return _Product.apply(input, self.weight, self.bias)

    def _use_onednn(self, x: Tensor) -> bool:
        return (
            x.dtype == self.weight.dtype == torch.float32
            and x.device.type == self.weight.device.type == "cpu"
            and x.ndim > 2
            and x.shape[-2] >= _FEWEST_ROWS
            and not torch.compiler.is_compiling()
            and mkl_keeps_to_avx2()
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.enabled
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # inductor's operator, which torch may rename
        )


def linear(width_in: int, width_out: int, *, bias: bool = True, gain: float = 1.0) -> Linear:
    """A Linear with Glorot-uniform weights times `gain` (0 makes it zero) and without bias at first."""
    layer = Linear(width_in, width_out, bias=bias)
    if gain:
        nn.init.xavier_uniform_(layer.weight, gain=gain)
    else:
        nn.init.zeros_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
