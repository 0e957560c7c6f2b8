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
    from .guided import GuidedRouter
    from .interop import load_tinyflux
    from .model import TinyFlux, TinyFluxOutput
    from .pipeline import StudentPipeline
    from .sampling import StudentModel, tinyflux_expert
    from .sources import DemoScenes, ImageFolder, TarFiles, open_source

# diffusers takes seconds to import: who asks for a name pays for what that name needs.
_NAMES = {
    "cache_build": ("Teachers", "build_cache"),
    "cache_read": ("FeatureCache", "MultiSource", "at_time"),
    "config": ("TinyFluxConfig",),
    "encoders": ("StudentEncoders", "TextEncoder"),
    "exchange": ("export_upstream", "import_upstream"),
    "features": ("T_BUCKETS", "ExpertFeatures", "Features"),
    "guided": ("GuidedRouter",),
    "interop": ("load_tinyflux",),
    "model": ("TinyFlux", "TinyFluxOutput"),
    "pipeline": ("StudentPipeline",),
    "sampling": ("StudentModel", "tinyflux_expert"),
    "sources": ("DemoScenes", "ImageFolder", "TarFiles", "open_source"),
}

__all__ = [
    "T_BUCKETS",
    "DemoScenes",
    "ExpertFeatures",
    "FeatureCache",
    "Features",
    "GuidedRouter",
    "ImageFolder",
    "MultiSource",
    "StudentEncoders",
    "StudentModel",
    "StudentPipeline",
    "TarFiles",
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
    "open_source",
    "tinyflux_expert",
]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
