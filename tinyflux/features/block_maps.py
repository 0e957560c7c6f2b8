"""What a block of an expert makes of a sample, place by place: what a student's tokens are aligned with.

From the latents to the map nothing happens on the host that depends on numbers: levels, timesteps and noise
are computed on the device. So a training step in which an expert answers may be recorded and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from moe_sampler._transfers import OnDevice
from moe_sampler.architectures import architecture_of, watchable
from moe_sampler.kernels import ddpm_training_pair, flow_training_pair
from moe_sampler.sampling.paths import FlowPath, Path, VPPath
from moe_sampler.tinyflux.features.capture import CaptureError

if TYPE_CHECKING:
    from moe_sampler.pipelines.hybrid import HybridPipeline

__all__ = ["BlockMaps"]


class BlockMaps:
    """Runs an expert up to one of its blocks, and returns what the block puts out.

    Args:
        expert: its name, "sol" or "lune".
        unet: in evaluation mode.
        path: the noise path it was trained on.
        block: the submodule's name, such as "mid_block" or "up_blocks.1"; by default the middle one.
        encode_prompt: prompts to [B, tokens, channels]; without it the caller gives `prompt_embeds`.

    Attributes:
        channels: of the maps.

    Raises:
        ValueError: a block that the model doesn't have, a model in training mode, a path that is neither
            `FlowPath` nor `VPPath`.
    """

    def __init__(
        self,
        expert: str,
        unet: nn.Module,
        path: Path,
        block: str | None = None,
        *,
        encode_prompt: Callable[[list[str]], Tensor] | None = None,
    ) -> None:
        architecture = watchable(unet)
        known = architecture.block_channels(unet)
        if block is None:
            middle = architecture.middle(unet)
            block = next((name for name in known if unet.get_submodule(name) is middle), None)
        if block not in known:
            raise ValueError(f"{expert} has no block {block or 'in the middle'}: choose {', '.join(known)}")
        if unet.training:
            raise ValueError(
                f"{expert} is in training mode, where dropout makes features random: call .eval()"
            )
        if not isinstance(path, FlowPath | VPPath):
            raise ValueError(f"{expert} is on a {type(path).__name__}, and maps need a FlowPath or a VPPath")
        self.expert, self.unet, self.path, self.block = expert, unet, path, block
        self.channels, self.encode_prompt = known[block], encode_prompt
        self._short = architecture.first_layers(unet, (block,))
        self._tables = _tables(path) if isinstance(path, VPPath) else ()

    @classmethod
    def from_pipeline(cls, pipe: HybridPipeline, expert: str = "lune", block: str | None = None) -> BlockMaps:
        """Of one of a pipeline's experts, on the path that its scheduler config names."""
        path = next(own.path for own in pipe.experts() if own.name == expert)
        return cls(expert, pipe.expert_unet(expert), path, block, encode_prompt=pipe.encode_texts)

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        prompt: list[str] | None = None,
        *,
        seeds: Tensor,
        noise: Tensor,
        prompt_embeds: Tensor | None = None,
    ) -> Tensor:
        """float32 [B, channels, h, w].

        Args:
            latents: [B, C, H, W], float32, clean: of the expert's own VAE, scaled.
            prompt: B texts; or `prompt_embeds`: [B, tokens, channels].
            seeds: int64 [B], of each sample's noise, as `philox_normal` makes it.
            noise: float32 [B] in [0, 1], the share of noise that the expert sees; on integer timesteps it is
                that of the nearest one.

        Raises:
            ValueError: neither prompt nor prompt_embeds, or both.
            CaptureError: the block didn't run once.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        if prompt_embeds is None:
            if self.encode_prompt is None:
                raise ValueError(f"{self.expert} came without a text encoder: give prompt_embeds")
            prompt_embeds = self.encode_prompt(list(prompt or ()))
        x, timestep = self._input(latents.contiguous(), seeds, noise)
        dtype = next(self.unet.parameters()).dtype
        found: list[Tensor] = []

        def keep(_module: nn.Module, _args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            found.append(output if isinstance(output, Tensor) else output[0])

        handle = self.unet.get_submodule(self.block).register_forward_hook(keep)
        try:
            architecture_of(self._short).call(
                self._short, x.to(dtype), timestep, prompt_embeds.to(latents.device, dtype)
            )
        finally:
            handle.remove()
        if len(found) != 1:
            raise CaptureError(f"{self.expert}'s {self.block} ran {len(found)} times in one forward pass")
        return found[0].float()

    def _input(self, x0: Tensor, seeds: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(What the expert sees, the timesteps [B] it is told)."""
        if isinstance(self.path, FlowPath):
            data, pure = (self.path.timestep(self.path.at(s)) for s in (0.0, 1.0))
            pair = flow_training_pair(x0, noise.contiguous(), seeds=seeds)
            return pair.noisy, data + (pure - data) * noise
        halfway, alphas, sigmas = (table.on(x0.device) for table in self._tables)
        timesteps = torch.searchsorted(halfway, noise.contiguous())
        pair = ddpm_training_pair(x0, timesteps, alphas, sigmas, seeds=seeds)
        return pair.noisy, timesteps.float()


def _tables(path: VPPath) -> tuple[OnDevice, OnDevice, OnDevice]:
    """Float32: the shares of noise half way between neighbouring timesteps [T - 1], alphas and sigmas [T]."""
    shares = path.sigmas / (path.alphas + path.sigmas)
    halfway = (shares[1:] + shares[:-1]) / 2
    halfway, alphas, sigmas = (
        OnDevice(torch.from_numpy(np.asarray(values, np.float32)))
        for values in (halfway, path.alphas, path.sigmas)
    )
    return halfway, alphas, sigmas
