"""diffusers' `register_to_config` with the signature of the `__init__` it decorates.

The original is not annotated, so that a type checker knows nothing of the arguments, not even that `self` is
bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

__all__ = ["register_to_config"]

if TYPE_CHECKING:
    Init = TypeVar("Init", bound=Callable[..., None])

    def register_to_config(init: Init) -> Init:
        """Keep the arguments of `__init__` in `self.config`."""
        ...
else:
    from diffusers.configuration_utils import register_to_config
