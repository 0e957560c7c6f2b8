"""TinyFlux, the student: a small Flux-like transformer that learns from Sol and Lune."""

from typing import TYPE_CHECKING

from moe_sampler._lazy import lazy_names

if TYPE_CHECKING:
    from moe_sampler.tinyflux.features.block_maps import BlockMaps
    from moe_sampler.tinyflux.features.cache_build import build_cache
    from moe_sampler.tinyflux.features.cache_read import FeatureCache, MultiSource, at_time
    from moe_sampler.tinyflux.features.encoders import StudentEncoders, TextEncoder
    from moe_sampler.tinyflux.features.exchange import export_upstream, import_upstream
    from moe_sampler.tinyflux.features.extract_rows import ExtractFeatures
    from moe_sampler.tinyflux.features.extraction import T_BUCKETS, ExpertFeatures, Features
    from moe_sampler.tinyflux.features.import_rows import import_rows
    from moe_sampler.tinyflux.features.teachers import Teachers
    from moe_sampler.tinyflux.model.config import TinyFluxConfig
    from moe_sampler.tinyflux.model.loading import load_tinyflux
    from moe_sampler.tinyflux.model.tinyflux import TinyFlux, TinyFluxOutput
    from moe_sampler.tinyflux.sampling.expert import StudentModel, tinyflux_expert
    from moe_sampler.tinyflux.sampling.guided import GuidedRouter
    from moe_sampler.tinyflux.sampling.pipeline import StudentPipeline
    from moe_sampler.tinyflux.training.alignment import Alignment, CachedMaps, LiveMaps, Maps, MapTeacher
    from moe_sampler.tinyflux.training.alignment_settings import AlignmentSettings
    from moe_sampler.tinyflux.training.noise_curve import NoiseCurve
    from moe_sampler.tinyflux.training.objective_settings import ObjectiveSettings, check_objective
    from moe_sampler.tinyflux.training.objectives import student_loss
    from moe_sampler.tinyflux.training.routed import RoutedTeachers
    from moe_sampler.tinyflux.training.teachers import (
        CachedTeachers,
        FeatureTeachers,
        LiveTeachers,
        Taught,
        check_shared_latents,
    )
    from moe_sampler.tinyflux.training.time_settings import TimeSettings
    from moe_sampler.tinyflux.training.times import sample_noise

# diffusers takes seconds to import: who asks for a name pays for what that name needs.
_NAMES = {
    "features.block_maps": ("BlockMaps",),
    "features.cache_build": ("build_cache",),
    "features.cache_read": ("FeatureCache", "MultiSource", "at_time"),
    "model.config": ("TinyFluxConfig",),
    "features.encoders": ("StudentEncoders", "TextEncoder"),
    "features.exchange": ("export_upstream", "import_upstream"),
    "features.extract_rows": ("ExtractFeatures",),
    "features.extraction": ("T_BUCKETS", "ExpertFeatures", "Features"),
    "features.import_rows": ("import_rows",),
    "features.teachers": ("Teachers",),
    "sampling.guided": ("GuidedRouter",),
    "model.loading": ("load_tinyflux",),
    "model.tinyflux": ("TinyFlux", "TinyFluxOutput"),
    "training.alignment": ("Alignment", "CachedMaps", "LiveMaps", "MapTeacher", "Maps"),
    "training.alignment_settings": ("AlignmentSettings",),
    "training.noise_curve": ("NoiseCurve",),
    "training.objective_settings": ("ObjectiveSettings", "check_objective"),
    "training.objectives": ("student_loss",),
    "sampling.pipeline": ("StudentPipeline",),
    "training.routed": ("RoutedTeachers",),
    "sampling.expert": ("StudentModel", "tinyflux_expert"),
    "training.teachers": (
        "CachedTeachers",
        "FeatureTeachers",
        "LiveTeachers",
        "Taught",
        "check_shared_latents",
    ),
    "training.time_settings": ("TimeSettings",),
    "training.times": ("sample_noise",),
}

__all__ = [
    "T_BUCKETS",
    "Alignment",
    "AlignmentSettings",
    "BlockMaps",
    "CachedMaps",
    "CachedTeachers",
    "ExpertFeatures",
    "ExtractFeatures",
    "FeatureCache",
    "FeatureTeachers",
    "Features",
    "GuidedRouter",
    "LiveMaps",
    "LiveTeachers",
    "MapTeacher",
    "Maps",
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
    "import_rows",
    "import_upstream",
    "load_tinyflux",
    "sample_noise",
    "student_loss",
    "tinyflux_expert",
]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
