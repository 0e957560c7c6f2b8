"""The student's tokens against an expert's feature map; `AlignmentSettings` says how.

Nothing here waits for the device, and what a step does doesn't depend on numbers: a weight that has fallen to
zero still multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_sampler._transfers import OnDevice
from moe_sampler.tinyflux.features.block_maps import BlockMaps
from moe_sampler.tinyflux.features.cache_read import FeatureCache, MultiSource, at_time
from moe_sampler.tinyflux.model.alignment import AlignmentProjector
from moe_sampler.tinyflux.model.tinyflux import TinyFlux
from moe_sampler.tinyflux.training.alignment_settings import AlignmentSettings
from moe_sampler.tinyflux.training.teachers import expert_text, resident, undisturbed
from moe_sampler.training import SettingsError
from moe_sampler.training.draws import Draws

__all__ = ["Alignment", "CachedMaps", "LiveMaps", "MapTeacher", "Maps"]

_TINY = 1e-6


class Maps(NamedTuple):
    """maps: float32 [B, channels, h, w]. has_maps: bool [B], the samples whose maps count."""

    maps: Tensor
    has_maps: Tensor


class MapTeacher(Protocol):
    """Implement this to align with something else.

    Attributes:
        channels: of the maps.
        planned: whether a step looks at captions or moves models, which the host does.
    """

    channels: int
    planned: bool

    def maps(self, batch: Mapping[str, Any], noise: Tensor, draws: Draws) -> Maps:
        """Of a batch of a cache's items. noise: float32 [B], the shares of noise that the teacher is to see.
        A step may be recorded and replayed, so nothing here may depend on numbers on the host."""
        ...


class CachedMaps:
    """The maps in a batch, linear between the times they were taken at.

    Args:
        data: what the batches are from.

    Raises:
        SettingsError: there are none, those of another expert or block, or none at the levels that
            `settings` asks for.
    """

    planned = False

    def __init__(self, data: FeatureCache | MultiSource, settings: AlignmentSettings) -> None:
        made = data.maps_made
        if made is None or not data.has_maps:
            raise SettingsError(
                'align_weight needs maps, and the cache has none: build it with "moe-sampler tinyflux cache '
                '--maps", or set align_maps to live'
            )
        for name, setting in (("expert", settings.align_expert), ("block", settings.align_block)):
            if setting not in (None, made[name]):
                whose = f"{made['expert']}'s {made['block']}"
                raise SettingsError(f"align_{name} is {setting}, but the cache's maps are of {whose}")
        lowest, highest = 1 - max(made["t"]), 1 - min(made["t"])
        if not all(lowest - _TINY <= level <= highest + _TINY for level in settings.noise_curve.values):
            levels = ", ".join(f"{1 - t:.6g}" for t in reversed(made["t"]))
            raise SettingsError(
                f"align_noise is {settings.align_noise}, but the cache has maps at noise {levels} alone"
            )
        self.channels = next(
            cache.shapes["block_maps"][2]
            for cache in ([data] if isinstance(data, FeatureCache) else data.caches)
            if cache.has_maps
        )
        self._times = OnDevice(torch.tensor(made["t"], dtype=torch.float32))

    def maps(self, batch: Mapping[str, Any], noise: Tensor, draws: Draws) -> Maps:
        """See `MapTeacher`."""
        kept = batch["block_maps"]
        found = at_time(kept, self._times.on(kept.device), 1 - noise).float()
        everywhere = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        return Maps(found, batch.get("has_maps", everywhere))


class LiveMaps:
    """An expert in the loop, without a gradient and in its own dtype. It sees the student's noise, at its own
    level.

    Args:
        expert: without `encode_prompt` the batch's `prompt_embeds` are taken for its text states.
        latents: of the batch, those that it knows, as `teachers.known_latents` finds them.
        offload: bring it to the batch's device for the call alone, and back.
    """

    def __init__(self, expert: BlockMaps, *, latents: str = "latents", offload: bool = False) -> None:
        self.channels, self.planned = expert.channels, offload or expert.encode_prompt is not None
        self._expert, self._latents, self._offload = expert, latents, offload

    def maps(self, batch: Mapping[str, Any], noise: Tensor, draws: Draws) -> Maps:
        """See `MapTeacher`."""
        latents = batch[self._latents]
        with undisturbed(latents.device), resident([self._expert.unet], latents.device, self._offload):
            text = expert_text(batch, self._expert.encode_prompt).to(latents.device)
            found = self._expert(latents.float(), seeds=draws.seeds("noise"), noise=noise, prompt_embeds=text)
        return Maps(found, torch.ones(len(latents), dtype=torch.bool, device=latents.device))


class Alignment:
    """What a step adds to the student's loss.

    Args:
        settings: with a weight.
        teacher: of the maps.
    """

    def __init__(self, settings: AlignmentSettings, teacher: MapTeacher) -> None:
        self.settings, self.teacher = settings, teacher
        self._noise = settings.noise_curve

    def prepare(self, student: TinyFlux, seed: int = 0) -> None:
        """Give the student its projector, with weights that follow from `seed`.

        Raises:
            SettingsError: `align_after` more blocks than the student has.
        """
        own, config = self.settings, student.config
        blocks = config["num_double_layers"] + config["num_single_layers"]
        after = max(1, round(blocks / 3)) if own.align_after is None else own.align_after
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projector = AlignmentProjector(
                config["hidden_size"], self.teacher.channels, own.align_projector, own.align_projector_width
            )
        try:
            student.align_after(after, projector)
        except ValueError as error:
            raise SettingsError(f"align_after: {error}") from None

    def weight(self, draws: Draws) -> Tensor:
        """float32 [], of the draws' step."""
        return draws.scheduled(self.settings.weight_at)

    def errors(
        self, aligned: Tensor, size: tuple[int, int], batch: Mapping[str, Any], noise: Tensor, draws: Draws
    ) -> Tensor:
        """float32 [B], 0 where a sample has no map.

        aligned: [B, h·w, channels], the student's projected tokens, of `size`. noise: [B], the student's.
        """
        maps, has_maps = self.teacher.maps(batch, self._noise(noise).to(noise.dtype), draws)
        target = resized(centred(maps, self.settings.align_centering), size)
        similar = F.cosine_similarity(aligned.float(), target.flatten(2).transpose(1, 2), dim=-1)
        return (1 - similar.mean(1)) * has_maps


def centred(maps: Tensor, share: float) -> Tensor:
    """(z - share·mean)/std over space, channel by channel (arXiv:2512.10794); maps: [B, C, h, w]. With a
    share of 0 the maps themselves."""
    if not share:
        return maps
    std, mean = torch.std_mean(maps, (2, 3), correction=0, keepdim=True)
    return (maps - share * mean) / (std + _TINY)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] to [B, C, *size], bilinear; averaged where that is smaller."""
    if tuple(maps.shape[2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False, antialias=True)
