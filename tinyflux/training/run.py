"""From settings to a trained student: what `moe-sampler tinyflux train` does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Subset

from moe_sampler.demo import experts_path
from moe_sampler.loading.fingerprint import fingerprint
from moe_sampler.pipelines.hybrid import HybridPipeline
from moe_sampler.pipelines.prompts import cut_silently
from moe_sampler.tinyflux.features.block_maps import BlockMaps
from moe_sampler.tinyflux.features.cache_read import FeatureCache, MultiSource
from moe_sampler.tinyflux.features.extraction import ExpertFeatures
from moe_sampler.tinyflux.model.config import TinyFluxConfig
from moe_sampler.tinyflux.model.tinyflux import TinyFlux
from moe_sampler.tinyflux.sampling.pipeline import StudentPipeline
from moe_sampler.tinyflux.training.alignment import Alignment, CachedMaps, LiveMaps
from moe_sampler.tinyflux.training.objective_settings import check_objective
from moe_sampler.tinyflux.training.routed import RoutedTeachers
from moe_sampler.tinyflux.training.settings import StudentSettings
from moe_sampler.tinyflux.training.task import StudentTask
from moe_sampler.tinyflux.training.teachers import (
    CachedTeachers,
    FeatureTeachers,
    LiveTeachers,
    check_shared_latents,
)
from moe_sampler.training import SettingsError, Trainer
from moe_sampler.training.settings import to_tables

__all__ = ["new_task", "train"]

_CONFIGS = {
    "demo": TinyFluxConfig.demo,
    "deep": TinyFluxConfig.deep,
    "deep_v4": TinyFluxConfig.deep_v4,
}
_SHOWN = 4  # captions of held-out samples, where no prompts are given


def train(settings: StudentSettings, *, quiet: bool = False) -> dict[str, Any]:
    """Train a student, or continue, in `settings.training.output_dir`. Returns what `Trainer.train` does.

    Raises:
        ValueError: settings, caches or models that can't be used, with what to do; nothing was done then.
    """
    task = new_task(settings)
    return Trainer(task, settings.training, record=to_tables(settings), quiet=quiet).train()


def new_task(settings: StudentSettings) -> StudentTask:
    """The student, its data and its teachers, checked against each other."""
    aligned = settings.alignment.align_weight > 0
    maps = aligned and settings.alignment.align_maps == "cached"
    caches = [FeatureCache(path, verify=settings.data.verify, maps=maps) for path in settings.data.caches]
    data = MultiSource(caches)
    held_out = settings.data.held_out
    if held_out >= len(data):
        raise SettingsError(f"held_out is {held_out}, but there are {len(data)} samples in all")
    model = _student(settings)
    _check_data(model, caches[0])
    pipe = _experts(settings, caches)
    teachers = _feature_teachers(settings, data, pipe)
    routed = None
    if pipe is not None and settings.objective.distill_weight:
        routed = RoutedTeachers.from_pipeline(
            pipe,
            settings.objective.router(),
            guidance_scale=settings.objective.distill_guidance_scale,
            offload=settings.teachers.offload,
        )
    check_objective(
        settings.objective,
        TinyFluxConfig.from_dict(dict(model.config)),
        () if teachers is None else teachers.teaches,
        routed is not None,
    )
    alignment = None
    if aligned:
        alignment = Alignment(settings.alignment, _map_teacher(settings, data, pipe))
        alignment.prepare(model, settings.training.seed)
    kept = len(data) - held_out
    validation = settings.validation
    return StudentTask(
        model,
        Subset(data, range(kept)),
        objective=settings.objective,
        time=settings.time,
        teachers=teachers,
        routed=routed,
        alignment=alignment,
        held_out=Subset(data, range(kept, len(data))) if held_out else None,
        noise_levels=validation.noise_levels,
        validation_batch_size=validation.validation_batch_size,
        paint=_painter(settings, model, data, kept, pipe),
        about={
            "config": {name: value for name, value in model.config.items() if not name.startswith("_")},
            "caches": [_about(cache) for cache in caches],
            "features": settings.teachers.features if teachers is not None else "none",
        },
    )


def _student(settings: StudentSettings) -> TinyFlux:
    wanted = settings.model
    if wanted.init_from is not None:
        return TinyFlux.from_pretrained(wanted.init_from).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.training.seed)
        return TinyFlux(_CONFIGS[wanted.preset](**wanted.changes()))


def _check_data(model: TinyFlux, cache: FeatureCache) -> None:
    for name, setting, axis in (
        ("latents", "in_channels", 0),
        ("prompt_embeds", "joint_attention_dim", -1),
        ("pooled_prompt_embeds", "pooled_projection_dim", -1),
        ("lune", "lune_expert_dim", -1),
        ("sol_maps", "sol_spatial_size", -1),
    ):
        if name not in cache.shapes:
            continue
        size = cache.shapes[name][1:][axis]
        if size != model.config[setting]:
            raise SettingsError(
                f"{cache.folder} has {name} of {size}, but the student's {setting} is "
                f"{model.config[setting]}: choose the preset whose sizes these are"
            )


def _experts(settings: StudentSettings, caches: list[FeatureCache]) -> HybridPipeline | None:
    """Experts to run in the loop, or None where nothing needs them."""
    teachers, objective, alignment = settings.teachers, settings.objective, settings.alignment
    live_maps = alignment.align_weight > 0 and alignment.align_maps == "live"
    if teachers.features == "cached" and not objective.distill_weight and not live_maps:
        return None
    source = _pipeline_of(settings)
    if source is None:
        raise SettingsError("experts in the loop: say where Sol and Lune are with experts")
    dtype = getattr(torch, teachers.experts_dtype)
    pipe = HybridPipeline.from_pretrained(source, dtype=dtype)
    for cache in caches:
        check_shared_latents(cache.manifest, pipe.vae)
    if not teachers.offload and torch.cuda.is_available():
        from accelerate import PartialState

        pipe.to(PartialState().device)
    return pipe


def _pipeline_of(settings: StudentSettings) -> str | None:
    if settings.teachers.experts is not None:
        return settings.teachers.experts
    return str(experts_path()) if settings.model.preset == "demo" else None


def _feature_teachers(
    settings: StudentSettings, data: MultiSource, pipe: HybridPipeline | None
) -> FeatureTeachers | None:
    if pipe is not None and settings.teachers.features == "live":
        return LiveTeachers(ExpertFeatures.from_pipeline(pipe), offload=settings.teachers.offload)
    return CachedTeachers(data) if data.has_lune or data.has_sol else None


def _map_teacher(
    settings: StudentSettings, data: MultiSource, pipe: HybridPipeline | None
) -> CachedMaps | LiveMaps:
    wanted = settings.alignment
    if pipe is None or wanted.align_maps == "cached":
        return CachedMaps(data, wanted)
    try:
        expert = BlockMaps.from_pipeline(pipe, wanted.align_expert or "lune", wanted.align_block)
    except ValueError as error:
        raise SettingsError(f"align_block: {error}") from None
    if all(_same_text(cache, pipe) for cache in data.caches):
        expert.encode_prompt = None  # a batch has the experts' text states: nothing is encoded in a step
    return LiveMaps(expert, offload=settings.teachers.offload)


def _same_text(cache: FeatureCache, pipe: HybridPipeline) -> bool:
    """Whether a cache's text states are what the experts' own text encoder says."""
    made = cache.manifest.encoders or {}
    length = (made.get("clip") or {}).get("max_length")
    return (
        made.get("text_states") == "clip"
        and length == pipe.tokenizer.model_max_length
        and made["clip"]["fingerprint"] == fingerprint(pipe.text_encoder)
    )


def _painter(
    settings: StudentSettings, model: TinyFlux, data: MultiSource, first: int, pipe: HybridPipeline | None
) -> Any:
    """Makes the sheet's pictures, or None where nothing says how to encode and decode."""
    validation = settings.validation
    source = validation.encoders or _pipeline_of(settings)
    if source is None:
        return None
    count = min(_SHOWN, len(data) - first)
    prompts = list(validation.prompts) or [data[first + i]["caption"] for i in range(count)]
    if not prompts:
        return None
    found = StudentPipeline.from_pretrained(model, pipe or source, encoders=validation.encoders)
    found.set_progress_bar_config(disable=True)
    told = False  # of prompts that are cut

    def paint(student: TinyFlux) -> list[Image.Image]:
        found.encoders.to(student.device)  # the student is where it belongs
        height, width = (side * found.encoders.scale for side in data[0]["latents"].shape[1:])
        nonlocal told
        with cut_silently() if told else nullcontext():
            told = True
            made = found(
                prompts,
                height,
                width,
                num_inference_steps=validation.num_inference_steps,
                guidance_scale=validation.guidance_scale,
                seed=list(range(len(prompts))),
            )
        assert not isinstance(made, tuple)
        return made.images

    return paint


def _about(cache: FeatureCache) -> dict[str, Any]:
    """Of a cache, what another cache in its place would differ in."""
    manifest = cache.manifest
    return {
        "samples": len(cache),
        "source": manifest.settings.get("source"),
        "shards": [record.sha256[:12] for record in manifest.shards],
    }
