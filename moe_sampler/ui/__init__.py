"""A page in the browser: type, look at the plan, watch the experts, compare, keep what is good.

It stands beside the command line, on the same settings: what a picture of one was made with, the other reads.
Needs the extra `ui` (Gradio), which is imported when a page is built.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .serving import build, serve

_NAMES = {"serving": ("build", "serve")}

__all__ = ["build", "serve"]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
