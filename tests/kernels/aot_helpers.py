"""What the tests of compiled code share."""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not available on this platform")
from bench import aot

__all__ = ["aot", "compilations", "compiled_code"]

compiled_code = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted function is never compiled"
)


def compilations(launches):
    """How many times Triton compiles for these launches of one kernel, asked through its own cache."""
    kernel = launches[0].kernel
    with aot.pretend_device(80) as device:
        kernel.device_caches.pop(device, None)
        for launch in launches:
            launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
        return len(kernel.device_caches[device][0])
