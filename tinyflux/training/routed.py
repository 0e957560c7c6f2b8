"""The routed experts' velocity at the student's noisy latent: Sol's near noise, Lune's near data.

The student's latent lies on the flow path, x = (1 - s)·x0 + s·ε at a share of noise s. An expert on another
path sees (α + σ)·x, the same sample on its own path at (α, σ) with s = σ/(α + σ). It answers with an output o
that means x0 = p·(α + σ)·x + q·o (`moe_sampler.sampling.predictions`), so its velocity is

    v = data - noise = (x0 - x)/s = (p·(α + σ) - 1)/s·x + q/s·o

in which the division by s cancels for every prediction type but x0 itself: nothing grows near the data. At
one s, v is affine in x0 with the same coefficients for all experts, and weights add up to 1, so mixing the
velocities is mixing the denoised samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_sampler._transfers import to_device
from moe_sampler.sampling.experts import Expert
from moe_sampler.sampling.predictions import x0_coefficients
from moe_sampler.sampling.routers import Router, active_experts
from moe_sampler.tinyflux.training.teachers import expert_text, resident, undisturbed

if TYPE_CHECKING:
    from moe_sampler.pipelines.hybrid import HybridPipeline

__all__ = ["RoutedTeachers"]


class RoutedTeachers:
    """Experts of the student's latent space (`teachers.check_shared_latents`), mixed by a router.

    An expert on integer timesteps is asked at the one nearest to s, and its velocity is that of this
    timestep's level, whose s differs by half a step of the grid at most. Beyond the ends of the grid, for Sol
    at s = 0.010 and 0.994, the levels there stand for all.

    Args:
        experts: with models called `model(sample, timestep [B], prompt_embeds=[B, tokens, channels])`, as
            those of a pipeline. Their own guidance settings are for sampling and not used.
        router: from a share of noise to weights by the experts' names.
        encode_prompt: captions to the experts' text states; without it the batch's `prompt_embeds` are these.
        guidance_scale: of classifier-free guidance, 1 or less is none.
        null_embeds: [1, tokens, channels], what guidance leads away from; by default the empty prompt.
        offload: by expert, the module to bring to the batch's device for the call alone, and back.

    Raises:
        ValueError: no experts, two of one name, one without a model, guidance without an empty prompt.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        router: Router,
        *,
        encode_prompt: Callable[[list[str]], Tensor] | None = None,
        guidance_scale: float = 1.0,
        null_embeds: Tensor | None = None,
        offload: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self._experts = {expert.name: expert for expert in experts}
        if not experts or len(self._experts) < len(experts):
            raise ValueError(f"give experts of different names, got {[e.name for e in experts]}")
        self._models = {expert.name: expert.model for expert in experts if expert.model is not None}
        if missing := [name for name in self._experts if name not in self._models]:
            raise ValueError(f"{', '.join(missing)} came without a model")
        if guidance_scale > 1 and encode_prompt is None and null_embeds is None:
            raise ValueError("guidance needs null_embeds where there is no encode_prompt")
        self._router, self._encode_prompt, self._scale = router, encode_prompt, guidance_scale
        self._null_embeds, self._offload = null_embeds, offload or {}

    @classmethod
    def from_pipeline(
        cls, pipe: HybridPipeline, router: Router, *, guidance_scale: float = 1.0, offload: bool = False
    ) -> RoutedTeachers:
        """A pipeline's experts, which the router calls by their names there ("sol" and "lune")."""
        experts = pipe.experts()
        return cls(
            experts,
            router,
            encode_prompt=pipe.encode_texts,
            guidance_scale=guidance_scale,
            offload={e.name: pipe.expert_unet(e.name) for e in experts} if offload else None,
        )

    def velocity(self, noisy: Tensor, noise: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """data - noise as the experts see it: float32 [B, C, h, w].

        noisy: float32 [B, C, h, w] on the flow path. noise: s, float32 [B] in (0, 1], on the host, where it
        is planned which expert runs on what. batch: with the samples' `caption`, or `prompt_embeds` [B,
        tokens, channels].
        """
        levels = noise.tolist()
        if not all(0 < level <= 1 for level in levels):
            raise ValueError(f"shares of noise must lie in (0, 1], got {levels}")
        weights = [active_experts(self._router, level, list(self._experts)) for level in levels]
        with undisturbed(noisy.device):
            text = expert_text(batch, self._encode_prompt).to(noisy.device)
            velocity = torch.zeros_like(noisy)
            for name, expert in self._experts.items():
                rows = [row for row, own in enumerate(weights) if name in own]
                if not rows:
                    continue
                places = _tensor(rows, noisy)
                own = self._of(expert, noisy[places], [levels[row] for row in rows], text[places])
                share = _tensor([weights[row][name] for row in rows], noisy).view(-1, 1, 1, 1)
                velocity.index_add_(0, places, share * own)
        return velocity

    def _of(self, expert: Expert, x: Tensor, levels: list[float], text: Tensor) -> Tensor:
        """One expert's velocity, [B, C, h, w]."""
        told, scales, from_x, from_output = zip(*(_terms(expert, s) for s in levels), strict=True)
        column = (-1, 1, 1, 1)
        sample = (x * _tensor(scales, x).view(column)).to(expert.dtype or torch.float32)
        module = self._offload.get(expert.name)
        home = nullcontext() if module is None else resident([module], x.device, offload=True)
        with home:
            output = self._predict(expert, sample, _tensor(told, x), text)
        return _tensor(from_x, x).view(column) * x + _tensor(from_output, x).view(column) * output

    def _predict(self, expert: Expert, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The expert's output with guidance, float32."""
        model = self._models[expert.name]
        if self._scale <= 1:
            return _output(model, sample, timestep, text)
        if self._null_embeds is None:
            assert self._encode_prompt is not None  # the constructor sees to it
            self._null_embeds = self._encode_prompt([""])
        null = self._null_embeds.to(text).expand_as(text)
        uncond, cond = _output(
            model, sample.repeat(2, 1, 1, 1), timestep.repeat(2), torch.cat([null, text])
        ).chunk(2)
        return torch.lerp(uncond, cond, self._scale)


def _terms(expert: Expert, noise: float) -> tuple[float, float, float, float]:
    """(timestep, scale of what the expert sees, coefficients of x and of its output in its velocity)."""
    level = expert.path.at(noise)
    timestep = expert.path.timestep(level)
    if expert.path.discrete:
        timestep = round(timestep)
        level = expert.path.level(timestep)
    scale = level.alpha + level.sigma
    p, q = x0_coefficients(expert.prediction, level)
    return timestep, scale, (p * scale - 1.0) / level.noise, q / level.noise


def _tensor(values: Sequence[float], like: Tensor) -> Tensor:
    return to_device(torch.tensor(values), like.device)


def _output(model: Callable[..., Any], sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    output = model(sample, timestep, prompt_embeds=text)
    return (output if isinstance(output, Tensor) else output[0]).float()
