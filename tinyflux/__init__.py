"""TinyFlux, the student: a small Flux-like transformer that learns from Sol and Lune."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TinyFluxConfig
    from .interop import load_tinyflux
    from .model import TinyFlux, TinyFluxOutput
    from .sampling import StudentModel, tinyflux_expert

# diffusers takes seconds to import: who asks for a name pays for what that name needs.
_NAMES = {
    "config": ("TinyFluxConfig",),
    "interop": ("load_tinyflux",),
    "model": ("TinyFlux", "TinyFluxOutput"),
    "sampling": ("StudentModel", "tinyflux_expert"),
}
_SOURCE = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "StudentModel",
    "TinyFlux",
    "TinyFluxConfig",
    "TinyFluxOutput",
    "load_tinyflux",
    "tinyflux_expert",
]


def __getattr__(name: str) -> Any:
    if name not in _SOURCE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_SOURCE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
