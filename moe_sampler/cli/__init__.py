"""The `moe-sampler` command; `root` puts it together."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .root import app, main

# Other packages' commands use what is beside `root`, and `root` uses them.
_NAMES = {"root": ("app", "main")}

__all__ = ["app", "main"]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
