"""Experts that ComfyUI has made ready: loaded, patched, their conditioning and ControlNets prepared.

ComfyUI readies a model around a sampler's run (`CFGGuider.sample`), with every hook and patch that a MODEL
may carry, and clears it up afterwards. So each expert is opened by a sampler that runs what is to be done
inside it; a second one is opened inside the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch

from .setups import ExpertSetup

__all__ = ["OpenExpert", "Work", "load", "opened"]


@dataclass(frozen=True)
class Work:
    """What experts are opened for.

    Args:
        latent, noise: [B, ...] of the run, as they go in: the latent an image or zeros, the noise N(0, 1).
        mask: where the latent is to be changed (1), or None for everywhere.
        seed: what patches that draw noise are told.
    """

    latent: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor | None
    seed: int


class OpenExpert:
    """One expert; `x0` works while it is open."""

    def __init__(self, setup: ExpertSetup) -> None:
        self.setup = setup
        self.guider = comfy.samplers.CFGGuider(setup.model)
        self.guider.inner_set_conds(setup.conds)
        self._masked: Any = None
        self._arguments: dict[str, Any] = {}

    def begin(
        self,
        sigmas: torch.Tensor,
        arguments: Mapping[str, Any],
        noise: torch.Tensor,
        latent: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> None:
        self._masked = comfy.samplers.KSamplerX0Inpaint(self.guider, sigmas)
        self._masked.noise, self._masked.latent_image = noise, latent
        self._arguments = {**arguments, "denoise_mask": mask}

    def end(self) -> None:
        self._masked, self._arguments = None, {}

    def x0(
        self, x: torch.Tensor, sigma: torch.Tensor, guidance: float, *, masked: bool = True
    ) -> torch.Tensor:
        """[B, ...]: what it believes the image is, with guidance and everything that patches do to it.

        Args:
            x: [B, ...] in the model's own convention.
            sigma: 0-d, the model's own.
            guidance: 1 is one pass without.
            masked: whether the latent stays where the run's mask says so; else the caller sees to it.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.guider.set_cfg(guidance)
        arguments = self._arguments if masked else {**self._arguments, "denoise_mask": None}
        return self._masked(x, sigma.expand(x.shape[0]), **arguments)


def load(guider: Any, shape: Sequence[int]) -> None:
    """An open guider's model back onto the device, if another's arrival drove it away.

    shape: of the latents.
    """
    patcher = guider.model_patcher
    comfy.sampler_helpers.prepare_sampling(patcher, shape, guider.conds, guider.model_options)
    patcher.model.current_patcher = patcher  # two experts may be one model with different patches


class _Inside:
    """A sampler, as ComfyUI takes it, that runs something while the expert is open."""

    def __init__(self, expert: OpenExpert, inside: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self._expert, self._inside = expert, inside

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        self._expert.begin(sigmas, extra_args, noise, latent_image, denoise_mask)
        try:
            self._inside(latent_image, noise)
        finally:
            self._expert.end()
        return latent_image


def opened(
    experts: Sequence[OpenExpert],
    sigmas: Mapping[str, torch.Tensor],
    work: Work,
    inside: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """Call `inside` with the latent (in the models' scale) and the noise, on the device, while all are open.

    Args:
        experts: at least one.
        sigmas: by name, the run's levels as each model calls them; some patches look where in them they are.
        work: the run.
        inside: what is to be done.
    """
    first, *others = experts
    nested = (lambda latent, noise: opened(others, sigmas, work, inside)) if others else inside
    first.guider.sample(
        work.noise,
        work.latent,
        _Inside(first, nested),
        sigmas[first.setup.name],
        denoise_mask=work.mask,
        callback=None,
        disable_pbar=True,
        seed=work.seed,
    )
