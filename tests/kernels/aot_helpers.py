"""What the tests of compiled code share."""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not available on this platform")
from bench import aot
from moe_sampler.kernels._jit import triton_version

__all__ = ["aot", "compilations", "compiled_code", "skip_unless_tuned"]

compiled_code = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted function is never compiled"
)


def skip_unless_tuned():
    """Registers, spills and widths are promises of one compiler's code; safety is one of every compiler's."""
    if triton_version() < (3, 7, 1):
        pytest.skip(f"resources are tuned for Triton 3.7.1, this is {triton_version()}")


def compilations(launches):
    """How many times Triton compiles for these launches of one kernel, asked through its own cache."""
    kernel = launches[0].kernel
    with aot.pretend_device(80) as device:
        kernel.device_caches.pop(device, None)
        for launch in launches:
            launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
        return len(kernel.device_caches[device][0])
