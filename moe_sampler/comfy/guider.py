"""The routed experts as a GUIDER, for every sampler and scheduler that ComfyUI has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.samplers
import torch

from ..sampling.routers import Router, active_experts
from .opened import OpenExpert, Work, load, opened
from .setups import ExpertSetup, RouterSetup, check_together, router_of

__all__ = ["RoutedGuider"]


class RoutedGuider(comfy.samplers.CFGGuider):
    """At each sigma of the first expert, the router's experts, each at the same noise level in its own terms.

    Samplers work in the first expert's convention; the others get the state rescaled, which at the same ratio
    of signal to noise is exact.
    """

    def __init__(self, experts: Sequence[ExpertSetup], router: RouterSetup | None) -> None:
        check_together(experts)
        host = experts[0]
        super().__init__(host.model)
        self._setups = {setup.name: setup for setup in experts}
        self._host, self._router = host, router_of(experts, router)
        self._others: dict[str, OpenExpert] = {}
        self._working = ""
        self.inner_set_conds(host.conds)

    def inner_sample(
        self,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        device: torch.device,
        sampler: Any,
        sigmas: torch.Tensor,
        denoise_mask: torch.Tensor | None,
        callback: Any,
        disable_pbar: bool,
        seed: int,
        **more: Any,
    ) -> torch.Tensor:
        made: list[torch.Tensor] = []

        def inside(*_: torch.Tensor) -> None:
            made.append(
                super(RoutedGuider, self).inner_sample(
                    noise,
                    latent_image,
                    device,
                    sampler,
                    sigmas,
                    denoise_mask,
                    callback,
                    disable_pbar,
                    seed,
                    **more,
                )
            )

        others = [OpenExpert(setup) for name, setup in self._setups.items() if name != self._host.name]
        if not others:
            inside()
            return made[0]
        noises = [self._host.levels.noise_at(float(sigma)) for sigma in sigmas]
        theirs = {own.setup.name: own.setup.levels.sigmas_at(noises) for own in others}
        self._others, self._working = {own.setup.name: own for own in others}, ""
        try:
            mask = None if denoise_mask is None else denoise_mask[:, :1]
            opened(others, theirs, Work(latent_image, noise, mask, seed), inside)
        finally:
            self._others = {}
        return made[0]

    def predict_noise(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any] | None = None,
        seed: Any = None,
    ) -> torch.Tensor:
        """[B, ...]: x0, as ComfyUI's samplers want it. timestep: [B], the first expert's sigma."""
        sigma = float(timestep[0])
        noise = self._host.levels.noise_at(sigma)
        x0 = None
        for name, weight in self._weights(noise).items():
            own = self._x0(name, x, timestep, sigma, noise, model_options or {}, seed) * weight
            x0 = own if x0 is None else x0 + own
        assert x0 is not None  # a router's weights add up to 1
        return x0

    def _weights(self, noise: float) -> dict[str, float]:
        names = list(self._setups)
        router: Router | None = self._router
        return {names[0]: 1.0} if router is None else active_experts(router, noise, names)

    def _x0(
        self,
        name: str,
        x: torch.Tensor,
        timestep: torch.Tensor,
        sigma: float,
        noise: float,
        model_options: dict[str, Any],
        seed: Any,
    ) -> torch.Tensor:
        setup, turn = self._setups[name], self._working != name
        guidance = setup.expert().guidance_at(noise)
        self._working = name
        if turn and self._others:
            load(self if setup is self._host else self._others[name].guider, x.shape)
        if setup is self._host:
            self.set_cfg(guidance)
            return super().predict_noise(x, timestep, model_options, seed)
        theirs = setup.levels.sigma_at(noise)
        own_sigma = torch.tensor(theirs, device=x.device)
        scale = theirs / sigma if sigma else 1.0  # some samplers look once more at the end
        # Whoever samples applies the mask, around the mixture.
        return self._others[name].x0(x * scale, own_sigma, guidance, masked=False)
