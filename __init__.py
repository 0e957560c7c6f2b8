"""Where ComfyUI looks when this repository is cloned into its `custom_nodes` (docs/COMFYUI.md).

No part of the package. Importing it does nothing: tools that meet it may.
"""

import importlib.util
import sys
from pathlib import Path

__all__ = ["comfy_entrypoint"]


def _use_clone() -> None:
    """Import `moe_sampler` from this clone, without installing it, and without a path on which `kernels` and
    `tinyflux` would be found by the names of other packages."""
    root = Path(__file__).parent
    package = root / "moe_sampler"
    spec = importlib.util.spec_from_file_location(
        "moe_sampler", package / "__init__.py", submodule_search_locations=[str(package), str(root)]
    )
    assert spec is not None and spec.loader is not None  # of a file with a name
    module = importlib.util.module_from_spec(spec)
    sys.modules["moe_sampler"] = module
    spec.loader.exec_module(module)


async def comfy_entrypoint():
    """What ComfyUI asks a custom node for."""
    if "moe_sampler" not in sys.modules:
        _use_clone()
    from moe_sampler.comfy import comfy_entrypoint

    return await comfy_entrypoint()
