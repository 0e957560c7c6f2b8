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
    from .noise_curve import NoiseCurve
    from .objective_settings import ObjectiveSettings, check_objective
    from .objectives import student_loss
    from .pipeline import StudentPipeline
    from .routed import RoutedTeachers
    from .sampling import StudentModel, tinyflux_expert
    from .teachers import CachedTeachers, FeatureTeachers, LiveTeachers, Taught, check_shared_latents
    from .time_settings import TimeSettings
    from .times import sample_noise

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
    "noise_curve": ("NoiseCurve",),
    "objective_settings": ("ObjectiveSettings", "check_objective"),
    "objectives": ("student_loss",),
    "pipeline": ("StudentPipeline",),
    "routed": ("RoutedTeachers",),
    "sampling": ("StudentModel", "tinyflux_expert"),
    "teachers": ("CachedTeachers", "FeatureTeachers", "LiveTeachers", "Taught", "check_shared_latents"),
    "time_settings": ("TimeSettings",),
    "times": ("sample_noise",),
}

__all__ = [
    "T_BUCKETS",
    "CachedTeachers",
    "ExpertFeatures",
    "FeatureCache",
    "FeatureTeachers",
    "Features",
    "GuidedRouter",
    "LiveTeachers",
    "MultiSource",
    "NoiseCurve",
    "ObjectiveSettings",
    "RoutedTeachers",
    "StudentEncoders",
    "StudentModel",
    "StudentPipeline",
    "Taught",
    "Teachers",
    "TextEncoder",
    "TimeSettings",
    "TinyFlux",
    "TinyFluxConfig",
    "TinyFluxOutput",
    "at_time",
    "build_cache",
    "check_objective",
    "check_shared_latents",
    "export_upstream",
    "import_upstream",
    "load_tinyflux",
    "sample_noise",
    "student_loss",
    "tinyflux_expert",
]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
