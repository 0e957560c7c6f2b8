"""Nodes for ComfyUI: any of its models as experts of one run. `comfy_entrypoint` is what ComfyUI asks for.

`nodes` is all that ComfyUI's start imports; a node's work is imported when it is first done.
"""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
