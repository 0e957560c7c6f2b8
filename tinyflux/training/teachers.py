"""Where the features come from that a student is taught: a cache, or the experts in the training loop.

Time t runs from noise (0) to data (1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_sampler._transfers import OnDevice, to_device
from moe_sampler.loading.fingerprint import portable_fingerprint, same_weights
from moe_sampler.pipelines.prompts import cut_silently
from moe_sampler.tinyflux.features.cache_format import Manifest
from moe_sampler.tinyflux.features.cache_read import (
    FeatureCache,
    MultiSource,
    at_time,
    between,
    buckets_around,
)
from moe_sampler.tinyflux.features.extraction import ExpertFeatures, check_buckets
from moe_sampler.training.draws import Draws

__all__ = [
    "CachedTeachers",
    "FeatureTeachers",
    "LiveTeachers",
    "Taught",
    "check_distillable",
    "check_shared_latents",
    "known_latents",
]


class Taught(NamedTuple):
    """What the experts say of B samples, each at its own time, float32; None where there is no such expert.

    lune: [B, channels]. sol_stats: [B, 3]. sol_map: [B, S, S], with a sum of 1. has_lune, has_sol: bool [B],
    the samples whose features count; the others' are placeholders.
    """

    lune: Tensor | None
    sol_stats: Tensor | None
    sol_map: Tensor | None
    has_lune: Tensor
    has_sol: Tensor


class FeatureTeachers(Protocol):
    """Implement this to teach from elsewhere.

    Attributes:
        teaches: which of "sol" and "lune" give features.
        planned: whether it runs experts, whose calls are planned on the host.
    """

    teaches: tuple[str, ...]
    planned: bool

    def features(self, batch: Mapping[str, Any], t: Tensor, draws: Draws) -> Taught:
        """Of a batch of a cache's items at times t, float32 [B], on the host if it is planned there."""
        ...


class CachedTeachers:
    """The features in a batch, linear between the times they were taken at.

    Args:
        data: what the batches are from.
    """

    planned = False

    def __init__(self, data: FeatureCache | MultiSource) -> None:
        self.teaches = tuple(name for name in ("sol", "lune") if getattr(data, f"has_{name}"))
        self._t_buckets = OnDevice(data.t_buckets)

    def features(self, batch: Mapping[str, Any], t: Tensor, draws: Draws) -> Taught:
        """See `FeatureTeachers`."""
        device = batch["latents"].device
        t_buckets, t = self._t_buckets.on(device), to_device(t, device)
        found = {
            name: at_time(batch[name], t_buckets, t).float() if name in batch else None
            for name in ("lune", "sol_stats", "sol_maps")
        }
        everywhere = torch.ones(len(t), dtype=torch.bool, device=t.device)
        has_lune, has_sol = (
            batch.get(f"has_{expert}", everywhere) if found[name] is not None else ~everywhere
            for expert, name in (("lune", "lune"), ("sol", "sol_stats"))
        )
        return Taught(found["lune"], found["sol_stats"], found["sol_maps"], has_lune, has_sol)


class LiveTeachers:
    """The experts themselves, run on every batch, without a gradient and in their own dtype.

    They see the very latent that the student sees: its noise, at its time; or, where their VAE is another
    one, their own latent of the same picture at that time. With `t_buckets` and `seed` they say instead what
    a cache of these says, which costs two passes a batch and not one.

    Args:
        experts: if they have no text encoder, the batch's `prompt_embeds` are taken for their text states.
        latents: of the batch, those that the experts know, as `known_latents` finds them.
        t_buckets: times of the cache to match.
        seed: of that cache.
        offload: bring the experts to the batch's device for the call alone, and back.

    Raises:
        ValueError: t_buckets without a seed, or the other way round; experts in upstream's convention, which
            knows no time between buckets.
    """

    planned = True

    def __init__(
        self,
        experts: ExpertFeatures,
        *,
        latents: str = "latents",
        t_buckets: Sequence[float] | None = None,
        seed: int | None = None,
        offload: bool = False,
    ) -> None:
        if (t_buckets is None) != (seed is None):
            raise ValueError("give both t_buckets and seed, to match a cache, or neither")
        if experts.convention != "sample":
            raise ValueError('live teachers need experts with convention="sample"')
        self.teaches = experts.teachers
        self._experts, self._seed, self._offload, self._latents = experts, seed, offload, latents
        self._t_buckets = (
            None if t_buckets is None else torch.tensor(check_buckets(t_buckets), dtype=torch.float64)
        )

    def features(self, batch: Mapping[str, Any], t: Tensor, draws: Draws) -> Taught:
        """See `FeatureTeachers`. The batch's noise is that of `draws.seeds("noise")`."""
        modules = [getattr(self._experts, name) for name in self.teaches]
        device = batch["latents"].device
        with undisturbed(device), resident(modules, device, self._offload):
            if self._t_buckets is None:
                lune, stats, maps = self._own(batch, t, draws)
            else:
                lune, stats, maps = self._as_cached(batch, t, self._t_buckets)
        has = torch.ones(len(t), dtype=torch.bool, device=device)
        return Taught(lune, stats, maps, has & (lune is not None), has & (stats is not None))

    def _extract(self, batch: Mapping[str, Any], seeds: Tensor, t: Tensor) -> list[Tensor | None]:
        text = expert_text(batch, self._experts.encode_prompt).to(batch["latents"].device)
        found = self._experts(batch[self._latents].float(), prompt_embeds=text, seeds=seeds, t=t)
        return list(found)

    def _own(self, batch: Mapping[str, Any], t: Tensor, draws: Draws) -> list[Tensor | None]:
        found = self._extract(batch, draws.seeds("noise"), t[:, None])
        return [None if part is None else part[:, 0] for part in found]

    def _as_cached(self, batch: Mapping[str, Any], t: Tensor, t_buckets: Tensor) -> list[Tensor | None]:
        before, after, weight = buckets_around(t_buckets, t)
        times = torch.stack([t_buckets[before], t_buckets[after]], 1)
        weight = to_device(weight, batch["latents"].device)
        found = self._extract(batch, self._seed + batch["index"], times)
        return [None if part is None else between(part[:, 0], part[:, 1], weight) for part in found]


def check_distillable(manifest: Manifest) -> None:
    """Whether a cache's latents may be those of the experts it was made with, from what it says alone.

    Raises:
        ValueError: they aren't.
    """
    own, theirs = ((part or {}).get("vae") for part in (manifest.encoders, manifest.experts))
    if own is not None and theirs is not None and not same_weights(own["fingerprint"], theirs["fingerprint"]):
        raise ValueError(
            "the student's latents are of another VAE than the experts', whose velocity says nothing there: "
            "set distill_weight to 0; their features can teach it, cached or live"
        )


def known_latents(data: MultiSource, vae: nn.Module) -> str:
    """What experts with this VAE can be run on: "latents", or the "expert_latents" of caches for a student
    with another one.

    Raises:
        ValueError: neither, with what to do.
    """
    if data.has_expert_latents:
        for cache in data.caches:
            made_with = (cache.manifest.experts or {}).get("vae") or {}
            if not same_weights(made_with.get("fingerprint", ""), portable_fingerprint(vae)):
                raise ValueError(f"{cache.folder} was made with other experts, whose VAE was another one")
        return "expert_latents"
    for cache in data.caches:
        check_shared_latents(cache.manifest, vae)
    return "latents"


def check_shared_latents(manifest: Manifest, vae: nn.Module) -> None:
    """Whether a cache's latents are those that experts with this VAE know.

    Raises:
        ValueError: they aren't, or it isn't known.
    """
    made_with = (manifest.encoders or {}).get("vae")
    if made_with is None:
        raise ValueError(
            "the cache doesn't say which VAE made its latents, so experts can't be run on them: build it "
            "from images"
        )
    if not same_weights(made_with["fingerprint"], portable_fingerprint(vae)):
        raise ValueError(
            "the cache's latents were made with another VAE than the experts', so these can't be run on "
            "them: build it with these experts, which then see latents of their own"
        )


def expert_text(batch: Mapping[str, Any], encode_prompt: Callable[[list[str]], Tensor] | None) -> Tensor:
    """[B, tokens, channels] for the experts' cross-attention: of the captions, or the batch's own states."""
    if encode_prompt is None:
        return batch["prompt_embeds"]
    with cut_silently():  # the cache's building has told of them
        return encode_prompt(list(batch["caption"]))


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Without a gradient, and in the models' own dtypes whatever the student is trained in."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def resident(modules: Sequence[nn.Module], device: torch.device, offload: bool) -> Iterator[None]:
    """Models on `device` for as long as the block lasts, if they may be moved.

    Raises:
        ValueError: they are elsewhere and must stay there.
    """
    homes = [(module, next(module.parameters()).device) for module in modules]
    away = [(module, home) for module, home in homes if home != device]
    if away and not offload:
        raise ValueError(f"the experts are on {away[0][1]}, the batch on {device}: move them, or use offload")
    try:
        for module, _ in away:
            module.to(device)
        yield
    finally:
        for module, home in away:
            module.to(home)
