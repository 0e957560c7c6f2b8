"""What Sol and Lune teach: features of a sample's own latent, at any list of times.

Time t runs from noise (0) to data (1), so the experts' share of noise is s = 1 - t. One noise a sample serves
all times, so what changes between two of them is the noise level alone:

    Lune    the mid block's output, averaged over space, on its own path at s
    Sol     statistics and map of its self-attention, at the integer timestep nearest to s; its latent is
            alpha * x0 + sigma * noise at exactly that timestep's level
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_sampler._transfers import to_device
from moe_sampler.architectures import architecture_of, watchable
from moe_sampler.kernels import (
    AttentionStatistics,
    attention_statistics,
    combine_statistics,
    ddpm_training_pair,
    flow_training_pair,
    philox_normal,
)
from moe_sampler.kernels.noise import seeds_tensor
from moe_sampler.pipelines.choices import CONVENTIONS, Convention
from moe_sampler.sampling.paths import FlowPath, Path, VPPath
from moe_sampler.tinyflux.features.capture import CaptureError, capture_self_attention

if TYPE_CHECKING:
    from moe_sampler.pipelines.hybrid import HybridPipeline

__all__ = [
    "CONVENTIONS",
    "T_BUCKETS",
    "UPSTREAMS",
    "Convention",
    "ExpertFeatures",
    "Features",
    "check_buckets",
]

UPSTREAMS: Convention = "tiny-flux-v4"
"""The convention that the published TinyFlux checkpoints were trained with."""
T_BUCKETS = tuple((5 + 10 * i) / 100 for i in range(10))
"""0.05, 0.15 ... 0.95: where caches hold features, unless told otherwise."""

Inputs = Iterator[tuple[Tensor, Tensor]]
"""(What an expert sees, the timestep it is told) of every pass through it."""


class Features(NamedTuple):
    """Features of B samples at T times, float32; None where there is no such expert.

    lune: [B, T, channels]. sol_stats: [B, T, 3], (locality, entropy, 1 - entropy). sol_maps: [B, T, S, S],
    the attention each place receives, with a sum of 1.
    """

    lune: Tensor | None
    sol_stats: Tensor | None
    sol_maps: Tensor | None


def check_times(t: Sequence[float]) -> tuple[float, ...]:
    """Times in [0, 1] as a tuple, or a ValueError."""
    times = tuple(float(value) for value in t)
    if not times or not all(0.0 <= value <= 1.0 for value in times):
        raise ValueError(f"times must lie between 0 (noise) and 1 (data), and be at least one, got {times}")
    return times


def _columns(t: Sequence[float] | Tensor, batch: int) -> list[tuple[float, ...]]:
    """The times of each pass through a model: one for all samples, or one a sample."""
    if not isinstance(t, Tensor):
        return [(time,) for time in check_times(t)]
    if not t.is_floating_point() or t.ndim != 2 or len(t) != batch or not t.numel():
        raise ValueError(f"t must be a sequence, or floating [{batch}, T], got {t.dtype} {list(t.shape)}")
    return [check_times(column) for column in t.T.tolist()]


def check_buckets(t_buckets: Sequence[float]) -> tuple[float, ...]:
    """Increasing times in [0, 1], or a ValueError."""
    buckets = check_times(t_buckets)
    if any(a >= b for a, b in itertools.pairwise(buckets)):
        raise ValueError(f"t_buckets must increase, got {buckets}")
    return buckets


class ExpertFeatures:
    """Extracts what the experts teach about latents and their prompts.

    Args:
        sol, lune: UNets in evaluation mode; either may be missing.
        sol_path, lune_path: the noise path each was trained on.
        encode_prompt: prompts to [B, tokens, channels] for the experts' cross-attention; without it the
            caller gives `prompt_embeds`.
        map_size: side of Sol's map.
        convention: "sample" as the module says. "tiny-flux-v4" does what the published TinyFlux checkpoints
            were trained with: both experts see pure noise, another one at every time, and timestep 1000 * t,
            which runs the wrong way round. Only for continuing those.

    Raises:
        ValueError: no expert at all, a model in training mode, or one that can't teach what is asked of it.
    """

    def __init__(
        self,
        *,
        sol: nn.Module | None = None,
        lune: nn.Module | None = None,
        sol_path: Path | None = None,
        lune_path: Path | None = None,
        encode_prompt: Callable[[list[str]], Tensor] | None = None,
        map_size: int = 8,
        convention: Convention = "sample",
    ) -> None:
        if convention not in CONVENTIONS:
            raise ValueError(f'unknown convention "{convention}": use one of {", ".join(CONVENTIONS)}')
        if map_size < 1:
            raise ValueError(f"map_size must be at least 1, got {map_size}")
        if sol is None and lune is None:
            raise ValueError("give sol, lune or both")
        for name, unet in (("sol", sol), ("lune", lune)):
            if unet is None:
                continue
            try:
                architecture = watchable(unet)
            except TypeError as error:
                raise TypeError(f"{name}: {error}") from None
            if unet.training:
                raise ValueError(
                    f"{name} is in training mode, where dropout makes features random: call .eval()"
                )
            if name == "lune" and architecture.middle(unet) is None:
                raise ValueError("lune has no mid block to take features from")
            if name == "sol" and not architecture.self_attention_layers(unet):
                raise ValueError("sol has no self-attention layers to take statistics from")
        self.sol, self.lune = sol, lune
        self.sol_path = VPPath.linear() if sol_path is None else sol_path
        self.lune_path = FlowPath() if lune_path is None else lune_path
        self.encode_prompt = encode_prompt
        self.map_size = map_size
        self.convention = convention

    @classmethod
    def from_pipeline(
        cls, pipe: HybridPipeline, teachers: Sequence[str] | None = None, **settings: Any
    ) -> ExpertFeatures:
        """The experts of a pipeline, with the paths that its scheduler configs name.

        Args:
            pipe: a HybridPipeline.
            teachers: "sol", "lune" or both; by default those that the pipeline has.
            settings: `map_size` and `convention`.

        Raises:
            ValueError: a teacher by another name, or one that the pipeline doesn't have.
        """
        if teachers is None:
            teachers = [name for name in ("sol", "lune") if name in pipe.expert_names]
        unknown = sorted(set(teachers) - {"sol", "lune"})
        if unknown:
            raise ValueError(f"teachers may be sol and lune, not {', '.join(unknown)}")
        models = {name: pipe.expert_unet(name) for name in teachers}
        paths = {f"{expert.name}_path": expert.path for expert in pipe.experts() if expert.name in models}
        return cls(**models, **paths, encode_prompt=pipe.encode_texts, **settings)

    @property
    def teachers(self) -> tuple[str, ...]:
        return tuple(name for name in ("sol", "lune") if getattr(self, name) is not None)

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        prompt: list[str] | None = None,
        *,
        seeds: Sequence[int] | Tensor,
        t: Sequence[float] | Tensor = T_BUCKETS,
        prompt_embeds: Tensor | None = None,
        **conditioning: Any,
    ) -> Features:
        """Features of latents at T times.

        Args:
            latents: [B, C, h, w], float32, clean: of the experts' own VAE, scaled.
            prompt: B texts; or `prompt_embeds`: [B, tokens, channels].
            seeds: B integers; a sample's noise is `philox_normal(latents.shape, seeds)`, so it depends on its
                own seed alone.
            t: times, 0 is noise and 1 is data: a sequence for all samples, or a floating tensor [B, T], each
                sample's own.
            conditioning: what else the UNets' forward needs, such as `added_cond_kwargs`.

        Raises:
            ValueError: inputs that don't fit together.
            CaptureError: a layer of Sol's that didn't show its queries and keys.
        """
        times = _columns(t, len(latents))
        if latents.ndim != 4 or latents.dtype != torch.float32:
            raise ValueError(
                f"latents must be float32 [B, C, h, w], got {latents.dtype} {list(latents.shape)}"
            )
        if prompt_embeds is None and prompt is not None:
            if self.encode_prompt is None:
                raise ValueError("these experts have no text encoder: give prompt_embeds")
            prompt_embeds = self.encode_prompt(list(prompt))
        elif prompt_embeds is None or prompt is not None:
            raise ValueError("give either prompt or prompt_embeds")
        seeds = seeds_tensor(seeds, latents.device)
        if not len(latents) == len(prompt_embeds) == len(seeds):
            raise ValueError(
                f"give as many latents, prompts and seeds: got {len(latents)}, {len(prompt_embeds)} and "
                f"{len(seeds)}"
            )
        latents = latents.contiguous()
        noise = philox_normal(latents.shape, seeds)

        def inputs(path: Path) -> Inputs:
            for index, column in enumerate(times):
                own = (
                    noise if self.convention == "sample" else philox_normal(latents.shape, seeds, step=index)
                )
                yield self._input(path, latents, own, column)

        lune = stats = maps = None
        if self.lune is not None:
            lune = self._lune(self.lune, inputs(self.lune_path), prompt_embeds, conditioning)
        if self.sol is not None:
            stats, maps = self._sol(self.sol, inputs(self.sol_path), prompt_embeds, conditioning)
        return Features(lune, stats, maps)

    def _input(
        self, path: Path, x0: Tensor, noise: Tensor, times: tuple[float, ...]
    ) -> tuple[Tensor, Tensor]:
        """(What an expert on `path` sees, the timestep it is told) at one time for all or one a sample."""

        def filled(values: Sequence[float]) -> Tensor:
            # Unlike a copy of a list, filling doesn't wait for the device.
            if len(values) == 1:
                return torch.full((1,), values[0], device=x0.device)
            return to_device(torch.tensor(values), x0.device)

        if self.convention == UPSTREAMS:
            return noise, filled([1000.0 * t for t in times])
        levels = [path.at(1.0 - t) for t in times]
        timesteps = [path.timestep(level) for level in levels]
        if not path.discrete:
            sigma = filled([level.noise for level in levels]).expand(len(x0)).contiguous()
            return flow_training_pair(x0, sigma, noise=noise).noisy, filled(timesteps)
        timesteps = [round(timestep) for timestep in timesteps]
        levels = [path.level(timestep) for timestep in timesteps]
        # Tables of the levels that are needed, a row each.
        alpha, sigma = filled([level.alpha for level in levels]), filled([level.sigma for level in levels])
        rows = torch.arange(len(levels), device=x0.device).expand(len(x0)).contiguous()
        return ddpm_training_pair(x0, rows, alpha, sigma, noise=noise).noisy, filled(timesteps)

    def _lune(
        self, lune: nn.Module, inputs: Inputs, prompt_embeds: Tensor, conditioning: dict[str, Any]
    ) -> Tensor:
        """[B, T, channels]: the mid block's output averaged over space; nothing after it is computed."""
        found: list[Tensor] = []
        architecture = watchable(lune)
        middle = architecture.middle(lune)
        assert middle is not None  # the constructor looked
        handle = middle.register_forward_hook(
            lambda _module, _args, output: found.append(output.mean((-2, -1), dtype=torch.float32))
        )
        try:
            short = architecture.first_layers(lune, ())
            for count, _ in enumerate(_passes(short, inputs, prompt_embeds, conditioning)):
                if len(found) != count + 1:
                    raise CaptureError(f"lune's mid block ran {len(found) - count} times in one forward pass")
        finally:
            handle.remove()
        return torch.stack(found, 1)

    def _sol(
        self, sol: nn.Module, inputs: Inputs, prompt_embeds: Tensor, conditioning: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """(stats [B, T, 3], maps [B, T, S, S]) of all self-attention layers."""
        layers: list[AttentionStatistics] = []
        sizes: list[tuple[int, int]] = []
        found: list[tuple[Tensor, Tensor]] = []

        def on_layer(_name: str, q: Tensor, k: Tensor, size: tuple[int, int]) -> None:
            layers.append(attention_statistics(q, k, *size))
            sizes.append(size)

        architecture = watchable(sol)
        short = architecture.first_layers(sol, architecture.self_attention_layers(sol))
        with capture_self_attention(sol, on_layer) as check:
            for _ in _passes(short, inputs, prompt_embeds, conditioning):
                check()
                found.append(combine_statistics(layers, sizes, self.map_size))
                layers.clear()
                sizes.clear()
        stats, maps = zip(*found, strict=True)
        return torch.stack(stats, 1), torch.stack(maps, 1)


def _passes(
    model: nn.Module, inputs: Inputs, prompt_embeds: Tensor, conditioning: dict[str, Any]
) -> Iterator[None]:
    """Run the model on every (x, timestep); each step of the iteration is a finished pass."""
    architecture, dtype = architecture_of(model), next(model.parameters()).dtype
    states = prompt_embeds.to(dtype)
    for x, timestep in inputs:
        architecture.call(model, x.to(dtype), timestep, states, **conditioning)
        yield
