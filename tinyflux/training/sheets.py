"""What makes the pictures of a student that is in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from PIL import Image

from moe_sampler.data.reports import say
from moe_sampler.demo import experts_path
from moe_sampler.loading.fingerprint import same_weights
from moe_sampler.loading.presets import preset
from moe_sampler.pipelines.hybrid import HybridPipeline
from moe_sampler.pipelines.prompts import cut_silently
from moe_sampler.tinyflux.features.cache_read import FeatureCache, MultiSource
from moe_sampler.tinyflux.features.encoders import StudentEncoders
from moe_sampler.tinyflux.model.tinyflux import TinyFlux
from moe_sampler.tinyflux.sampling.pipeline import StudentPipeline
from moe_sampler.tinyflux.training.settings import StudentSettings
from moe_sampler.training import SettingsError

__all__ = ["encoder_places", "expert_places", "painter"]

_SHOWN = 4  # captions of held-out samples, where no prompts are given
_PLACES = ("encoders", "vae", "clip", "t5")


def expert_places(settings: StudentSettings) -> dict[str, Any]:
    """Where the experts are, as `HybridPipeline.from_pretrained` takes it; empty where nothing says."""
    places = settings.teachers.places()
    if places or settings.model.preset != "demo":
        return places
    return {"pretrained_model_name_or_path": str(experts_path())}


def painter(
    settings: StudentSettings, model: TinyFlux, data: MultiSource, first: int, pipe: HybridPipeline | None
) -> Callable[[TinyFlux], list[Image.Image]] | None:
    """Makes the sheet's pictures, or None where nothing says how to encode and decode.

    first: of the samples that are held out. pipe: the experts, where they are loaded.

    Raises:
        CheckpointError: encoders that can't be loaded.
        SettingsError: others than those the cache was made with.
    """
    validation = settings.validation
    count = min(_SHOWN, len(data) - first)
    prompts = list(validation.prompts) or [data[first + i]["caption"] for i in range(count)]
    encoders = _encoders(settings, data, pipe) if prompts else None
    if encoders is None:
        return None
    found = StudentPipeline(model, encoders)
    found.set_progress_bar_config(disable=True)
    told = False  # of prompts that are cut

    def paint(student: TinyFlux) -> list[Image.Image]:
        found.encoders.to(student.device)  # the student is where it belongs
        nonlocal told
        with cut_silently() if told else nullcontext():
            told = True
            made = found(
                prompts,
                num_inference_steps=validation.num_inference_steps,
                guidance_scale=validation.guidance_scale,
                seed=list(range(len(prompts))),
            )
        assert not isinstance(made, tuple)
        return made.images

    return paint


def encoder_places(settings: StudentSettings, cache: FeatureCache) -> dict[str, Any] | None:
    """Where the student's encoders are, as `StudentEncoders.gather` takes it, with what is on this machine in
    full; None where the settings don't say."""
    validation = settings.validation
    given = {name: getattr(validation, name) for name in _PLACES}
    said = {name: place for name, place in given.items() if place is not None}
    if not said:
        return None
    found: dict[str, Any] = {
        name: str(Path(place).resolve()) if Path(place).exists() else place for name, place in said.items()
    }
    length = ((cache.manifest.encoders or {}).get("t5") or {}).get("max_length")
    length = length if validation.t5_length is None else validation.t5_length
    return found if length is None else found | {"t5_length": length}


def _encoders(
    settings: StudentSettings, data: MultiSource, pipe: HybridPipeline | None
) -> StudentEncoders | None:
    made_with = data.caches[0].manifest.encoders or {}
    said = encoder_places(settings, data.caches[0])
    given = dict(said or {})
    if said is None and pipe is None:
        places = expert_places(settings)
        name = places.get("preset")
        base = places.get("pretrained_model_name_or_path") or (preset(name).base if name else None)
        if base is None:
            return None
        given["encoders"] = base
    found = StudentEncoders.gather(pipe, **given)
    others = _other_than(made_with, found.describe())
    if others and said:
        raise SettingsError(
            f"validation: {' and '.join(others)} aren't what {data.caches[0].folder} was made with: sheets "
            "of samples would not show the student"
        )
    if others:
        say(
            "no sheets of samples: the experts' encoders aren't the student's; say where these are with "
            "encoders, or vae, clip and t5, of validation"
        )
        return None
    return found


def _other_than(made_with: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The encoders that a cache was made with others than these; it may not say."""
    others = []
    for name in ("vae", "clip", "t5") if made_with else ():
        one, other = made_with.get(name), found[name]
        same = one is other is None or (
            one is not None and other is not None and same_weights(one["fingerprint"], other["fingerprint"])
        )
        others += [] if same else [name]
    return others
