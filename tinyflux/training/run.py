"""From settings to a trained student: what `moe-sampler tinyflux train` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch.utils.data import Subset

from moe_sampler.data.reports import say
from moe_sampler.loading.fingerprint import portable_fingerprint, same_weights
from moe_sampler.pipelines.hybrid import HybridPipeline
from moe_sampler.tinyflux.features.block_maps import BlockMaps
from moe_sampler.tinyflux.features.cache_read import FeatureCache, MultiSource
from moe_sampler.tinyflux.features.extraction import ExpertFeatures
from moe_sampler.tinyflux.model.config import TinyFluxConfig
from moe_sampler.tinyflux.model.lora import TARGETS, add_lora
from moe_sampler.tinyflux.model.tinyflux import TinyFlux
from moe_sampler.tinyflux.training.alignment import Alignment, CachedMaps, LiveMaps
from moe_sampler.tinyflux.training.new_student import SIZES, student_of
from moe_sampler.tinyflux.training.objective_settings import ObjectiveSettings, check_objective
from moe_sampler.tinyflux.training.routed import RoutedTeachers
from moe_sampler.tinyflux.training.settings import StudentSettings
from moe_sampler.tinyflux.training.sheets import encoder_places, expert_places, painter
from moe_sampler.tinyflux.training.task import StudentTask
from moe_sampler.tinyflux.training.teachers import (
    CachedTeachers,
    FeatureTeachers,
    LiveTeachers,
    check_distillable,
    check_shared_latents,
    known_latents,
)
from moe_sampler.training import SettingsError, Trainer
from moe_sampler.training.settings import to_tables

__all__ = ["new_task", "train"]


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
    caches = [
        FeatureCache.from_pretrained(path, verify=settings.data.verify, maps=maps)
        for path in settings.data.caches
    ]
    data = MultiSource(caches)
    held_out = settings.data.held_out
    if held_out >= len(data):
        raise SettingsError(f"held_out is {held_out}, but there are {len(data)} samples in all")
    model = student_of(settings, caches[0])
    objective = _objective(settings)
    _check_data(model, caches[0])
    remember(model, caches[0], settings)
    pipe = _experts(settings, caches)
    teachers = _feature_teachers(settings, data, pipe)
    routed = None
    if pipe is not None and objective.distill_weight:
        routed = RoutedTeachers.from_pipeline(
            pipe,
            objective.router(),
            guidance_scale=objective.distill_guidance_scale,
            offload=settings.teachers.offload,
        )
    check_objective(
        objective,
        TinyFluxConfig.from_dict(dict(model.config)),
        () if teachers is None else teachers.teaches,
        routed is not None,
        data.has_masks,
    )
    lora = settings.lora
    if lora.lora_rank:
        try:
            add_lora(
                model,
                lora.lora_rank,
                lora.alpha,
                targets=lora.lora_targets or TARGETS,
                dropout=lora.lora_dropout,
                seed=settings.training.seed,
            )
        except ValueError as error:
            raise SettingsError(f"lora_targets: {error}") from None
    alignment = None
    if aligned:
        alignment = Alignment(settings.alignment, _map_teacher(settings, data, pipe))
        alignment.prepare(model, settings.training.seed)
    kept = len(data) - held_out
    validation = settings.validation
    return StudentTask(
        model,
        Subset(data, _repeated(caches, settings.data.repeats, kept)),
        objective=objective,
        time=settings.time,
        teachers=teachers,
        routed=routed,
        alignment=alignment,
        lora_alpha=lora.alpha if lora.lora_rank else None,
        held_out=Subset(data, range(kept, len(data))) if held_out else None,
        noise_levels=validation.noise_levels,
        validation_batch_size=validation.validation_batch_size,
        paint=painter(settings, model, data, kept, pipe),
        about={
            "config": {name: value for name, value in model.config.items() if not name.startswith("_")},
            "caches": [_about(cache) for cache in caches],
            **({"lora": to_tables(lora)} if lora.lora_rank else {}),
            **({"repeats": list(settings.data.repeats)} if settings.data.repeats else {}),
            "features": settings.teachers.features if teachers is not None else "none",
        },
    )


def _repeated(caches: Sequence[FeatureCache], repeats: Sequence[int], kept: int) -> Sequence[int]:
    """Which samples an epoch has; kept: those that aren't held out."""
    if set(repeats) <= {1}:
        return range(kept)
    found: list[int] = []
    first = 0
    for cache, often in zip(caches, repeats, strict=True):
        found += [*range(first, min(first + len(cache), kept))] * often
        first += len(cache)
    return found


def _objective(settings: StudentSettings) -> ObjectiveSettings:
    """Adapters don't reach what predicts the experts' features."""
    if not settings.lora.lora_rank:
        return settings.objective
    return replace(settings.objective, lune_weight=0.0, sol_stats_weight=0.0, sol_map_weight=0.0)


def _check_data(model: TinyFlux, cache: FeatureCache) -> None:
    for setting, (name, axis) in SIZES.items():
        if name not in cache.shapes:
            continue
        size = cache.shapes[name][1:][axis]
        if size != model.config[setting]:
            raise SettingsError(
                f"{cache.folder} has {name} of {size}, but the student's {setting} is "
                f"{model.config[setting]}: these data are of other encoders or experts than the student"
            )


def _experts(settings: StudentSettings, caches: list[FeatureCache]) -> HybridPipeline | None:
    """Experts to run in the loop, or None where nothing needs them."""
    teachers, objective, alignment = settings.teachers, settings.objective, settings.alignment
    live_maps = alignment.align_weight > 0 and alignment.align_maps == "live"
    if teachers.features == "cached" and not objective.distill_weight and not live_maps:
        return None
    places = expert_places(settings)
    if not places:
        raise SettingsError("experts in the loop: say where Sol and Lune are with experts or experts_preset")
    if objective.distill_weight:
        for cache in caches:
            check_distillable(cache.manifest)
    pipe = HybridPipeline.from_pretrained(**places, dtype=getattr(torch, teachers.experts_dtype))
    if objective.distill_weight:
        if absent := [name for name in ("sol", "lune") if name not in pipe.expert_names]:
            raise SettingsError(f"distill_weight needs Sol and Lune, and the experts have no {absent[0]}")
        for cache in caches:
            check_shared_latents(cache.manifest, pipe.vae)
    if not teachers.offload and torch.cuda.is_available():
        from accelerate import PartialState

        pipe.to(PartialState().device)
    return pipe


def _feature_teachers(
    settings: StudentSettings, data: MultiSource, pipe: HybridPipeline | None
) -> FeatureTeachers | None:
    if pipe is not None and settings.teachers.features == "live":
        return LiveTeachers(
            ExpertFeatures.from_pipeline(pipe),
            latents=known_latents(data, pipe.vae),
            offload=settings.teachers.offload,
        )
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
    latents = known_latents(data, pipe.vae)
    return LiveMaps(expert, latents=latents, offload=settings.teachers.offload)


def _same_text(cache: FeatureCache, pipe: HybridPipeline) -> bool:
    """Whether a cache's text states are what the experts' own text encoder says."""
    made = cache.manifest.encoders or {}
    length = (made.get("clip") or {}).get("max_length")
    return (
        made.get("text_states") == "clip"
        and length == pipe.tokenizer.model_max_length
        and same_weights(made["clip"]["fingerprint"], portable_fingerprint(pipe.text_encoder))
    )


def remember(model: TinyFlux, cache: FeatureCache, settings: StudentSettings) -> None:
    """Note in the student's config what it is trained on from here, for whoever samples with it."""
    dropout = settings.objective.text_dropout
    found = asdict(cache.manifest.latents) | {"sample_size": list(cache.shapes["latents"][2:])}
    if model.config["text_dropout"] if dropout is None else dropout:
        found["negative_prompt"] = None  # the null condition is learned
    if (places := encoder_places(settings, cache)) is not None:
        found["encoders"] = places
    if settings.model.init_from is not None:
        before = {name: model.config[name] for name in ("text_mask", "latent_shift")}
        changed = [
            f"{name} was {value}, now {found[name]}"
            for name, value in before.items()
            if value is not None and value != found[name]
        ]
        if changed:
            say(f"{settings.model.init_from} was trained on other data than these: {'; '.join(changed)}")
    model.register_to_config(**found)


def _about(cache: FeatureCache) -> dict[str, Any]:
    """Of a cache, what another cache in its place would differ in."""
    manifest = cache.manifest
    return {
        "samples": len(cache),
        "source": manifest.settings.get("source"),
        "shards": [record.sha256[:12] for record in manifest.shards],
    }
