"""TinyFlux, the student: a small Flux-like transformer that learns from Sol and Lune."""

from typing import TYPE_CHECKING

from moe_sampler._lazy import lazy_names

if TYPE_CHECKING:
    from .cache_build import Teachers, build_cache
    from .cache_read import FeatureCache, MultiSource, at_time
    from .config import TinyFluxConfig
    from .encoders import StudentEncoders, TextEncoder
    from .exchange import export_upstream, import_upstream
    from .features import T_BUCKETS, ExpertFeatures, Features
    from .interop import load_tinyflux
    from .model import TinyFlux, TinyFluxOutput
    from .sampling import StudentModel, tinyflux_expert

# diffusers takes seconds to import: who asks for a name pays for what that name needs.
_NAMES = {
    "cache_build": ("Teachers", "build_cache"),
    "cache_read": ("FeatureCache", "MultiSource", "at_time"),
    "config": ("TinyFluxConfig",),
    "encoders": ("StudentEncoders", "TextEncoder"),
    "exchange": ("export_upstream", "import_upstream"),
    "features": ("T_BUCKETS", "ExpertFeatures", "Features"),
    "interop": ("load_tinyflux",),
    "model": ("TinyFlux", "TinyFluxOutput"),
    "sampling": ("StudentModel", "tinyflux_expert"),
}

__all__ = [
    "T_BUCKETS",
    "ExpertFeatures",
    "FeatureCache",
    "Features",
    "MultiSource",
    "StudentEncoders",
    "StudentModel",
    "Teachers",
    "TextEncoder",
    "TinyFlux",
    "TinyFluxConfig",
    "TinyFluxOutput",
    "at_time",
    "build_cache",
    "export_upstream",
    "import_upstream",
    "load_tinyflux",
    "tinyflux_expert",
]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
