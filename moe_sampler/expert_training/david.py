"""David: weighing a sample by what the UNet's own blocks know of it.

Sol was trained with loss weights from David, AbstractPhil's geometric assessor of block features: weights =
f(assessor(features, timestep)). Nothing of it is published beside that idea, so this is an assessor of our
own, inspired by it. What a block makes of a sample is pooled to a coarse grid, and a small probe a block is
asked two things of it: at which noise level the sample is (a bin of s), and which structure it has. The
structure class is the cluster of the sample's own latent, pooled to 4 × 4: one definition for any images.

The probes' cross-entropies, each over the logarithm of its number of classes so that 1 is chance, averaged
over the two questions and over the blocks, are the sample's error e. What is expected at its noise level, ē,
is learnt along: much noise hides the structure from the best of models, which is no reason for weight. Where
the blocks say less than they say of other samples of that level, the surprise e − ē is positive, and

    w_b = 1 + c·(surprise_b − mean surprise)

with the largest c up to `weight_strength` that keeps every weight within its bounds. So the mean weight of
every micro-batch is exactly 1, the bounds hold exactly, and the balance of the noise levels stays.

The probes see detached features: they never change the UNet but through the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn

from ..architectures import watchable
from .settings import DavidSettings

__all__ = ["AssessedUNet", "Assessment", "Assessor", "BlockProbes", "bounded_weights", "structure_classes"]

GRID = 4
"""Block features and latents are pooled to GRID × GRID."""
PROBE_SCALE = 0.01
"""Of the probes' loss. AdamW's steps don't depend on a loss's scale, so they learn as fast as with 1; but
their gradients then hardly count where all gradients are clipped together."""


class Assessment(NamedTuple):
    """weights: float32 [B], detached, mean 1. loss: [], what trains the assessor, or None."""

    weights: Tensor
    loss: Tensor | None


class Assessor(Protocol):
    """Implement this, as an `nn.Module`, to weigh samples in another way."""

    def __call__(self, features: Mapping[str, Tensor], noise: Tensor, structure: Tensor) -> Assessment:
        """features: [B, channels, h, w] a block, detached, by the block's name. noise: [B], shares of noise.
        structure: int64 [B], structure classes."""
        ...


class BlockProbes(nn.Module):
    """The assessor of this module's docstring.

    Args:
        channels: of every block's output, by its name, as an architecture's `block_channels` finds them.
        settings: bins, classes, strength and bounds.
    """

    def __init__(self, channels: Mapping[str, int], settings: DavidSettings | None = None) -> None:
        super().__init__()
        self.settings = settings = DavidSettings() if settings is None else settings
        self.probes = nn.ModuleDict(
            {
                name.replace(".", "_"): _probe(
                    width * GRID * GRID, settings.probe_bins + settings.structure_classes
                )
                for name, width in channels.items()
            }
        )
        # Parameters, so that optimizer, processes and checkpoints take care of them; 1 is chance.
        self.expected = nn.Parameter(torch.ones(settings.probe_bins))

    def forward(self, features: Mapping[str, Tensor], noise: Tensor, structure: Tensor) -> Assessment:
        bins = (noise * self.settings.probe_bins).long().clamp(0, self.settings.probe_bins - 1)
        errors = torch.stack(
            [
                self._error(self.probes[name.replace(".", "_")](_unit(_coarse(block))), bins, structure)
                for name, block in features.items()
            ]
        ).mean(0)
        expected = self.expected[bins]
        surprise = (errors - expected).detach()
        loss = errors.mean() + F.mse_loss(expected, errors.detach())
        own = self.settings
        weights = bounded_weights(surprise, own.weight_strength, own.lowest_weight, own.highest_weight)
        return Assessment(weights, PROBE_SCALE * loss)

    def _error(self, logits: Tensor, bins: Tensor, structure: Tensor) -> Tensor:
        """[B]: cross-entropies of both questions, 1 at chance."""
        level, kind = logits.split((self.settings.probe_bins, self.settings.structure_classes), -1)
        asked = ((level, bins), (kind, structure))
        errors = [F.cross_entropy(x, y, reduction="none") / math.log(x.shape[-1]) for x, y in asked]
        return torch.stack(errors).mean(0)


def _probe(width: int, answers: int) -> nn.Linear:
    """At chance to begin with, so that nothing is a surprise before the probe has learnt."""
    linear = nn.utils.skip_init(nn.Linear, width, answers)  # which leaves the global generator alone
    assert isinstance(linear, nn.Linear)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _unit(values: Tensor) -> Tensor:
    """[B, width] without their mean, at length 1: AdamW moves every weight by the learning rate, so that with
    thousands of inputs of size 1 the answers would jump."""
    return F.normalize(values - values.mean(-1, keepdim=True), dim=-1)


def _coarse(block: Tensor) -> Tensor:
    """[B, channels · GRID²] of [B, channels, h, w]."""
    return F.adaptive_avg_pool2d(block.float(), GRID).flatten(1)


def bounded_weights(surprise: Tensor, strength: float, lowest: float, highest: float) -> Tensor:
    """float32 [B] with mean 1, within [lowest, highest], that grow linearly with surprise: [B]."""
    distance = surprise.float() - surprise.float().mean()
    tiny = torch.finfo(torch.float32).tiny
    up, down = distance.max().clamp_min(tiny), (-distance.min()).clamp_min(tiny)
    slope = torch.minimum((highest - 1) / up, (1 - lowest) / down).clamp_max(strength)
    return (1 + slope * distance).clamp(lowest, highest)


class AssessedUNet(nn.Module):
    """A UNet and its assessor, trained as one: both are in its checkpoints.

    Args:
        unet: what is trained.
        assessor: watches its blocks.
    """

    def __init__(self, unet: ModelMixin, assessor: nn.Module) -> None:
        super().__init__()
        self.unet, self.assessor = unet, assessor
        self._features: dict[str, Tensor] = {}
        self._architecture = watchable(unet)
        for name in self._architecture.block_channels(unet):
            unet.get_submodule(name).register_forward_hook(self._watch(name))

    def _watch(self, name: str):
        def hook(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> None:
            # A down block's output is a pair: what goes on, and what up blocks are shown.
            self._features[name] = (output if isinstance(output, Tensor) else output[0]).detach()

        return hook

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        noise: Tensor | None = None,
        structure: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor, ...]:
        """(the UNet's answer, weights, the assessor's loss); the answer alone without `structure`.

        sample: [B, C, h, w]. timestep: [B] or []. encoder_hidden_states: [B, tokens, channels]. noise,
        structure: as `Assessor`. return_dict: as the UNet has it; there is none here.
        """
        if return_dict:
            raise ValueError("an assessed UNet returns a tuple")
        self._features.clear()
        answer = self._architecture.call(self.unet, sample, timestep, encoder_hidden_states)
        features, self._features = dict(self._features), {}
        if structure is None:
            return (answer,)
        return answer, *self.assessor(features, noise, structure)


@torch.no_grad()
def structure_classes(latents: Tensor, classes: int, rounds: int = 25) -> Tensor:
    """int64 [N]: the cluster of every latent, pooled to GRID × GRID, by k-means (Lloyd 1982).

    latents: float [N, C, h, w]. classes: k, at most N. Deterministic: it begins with the latent nearest to
    the mean, and then again and again with the one farthest from all centres so far.
    """
    if not 2 <= classes <= len(latents):
        raise ValueError(f"classes must lie between 2 and the {len(latents)} images there are, got {classes}")
    points = _coarse(latents).cpu()
    centres = points[(points - points.mean(0)).square().sum(1).argmin()][None]
    distance = (points - centres).square().sum(1)
    while len(centres) < classes:
        centres = torch.cat([centres, points[distance.argmax()][None]])
        distance = torch.minimum(distance, (points - centres[-1]).square().sum(1))
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=classes)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return torch.cdist(points, centres).argmin(1)
