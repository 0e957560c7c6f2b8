"""Attributes as class labels, and the small image network that reads them off a picture."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_sampler.kernels import philox_normal

from ..training.draws import Draws
from .scenes import KINDS, Scene

HEADS: dict[str, tuple[str, ...]] = {"kind": tuple(KINDS)}
for _kind, _module in KINDS.items():
    HEADS.update({f"{_kind}.{name}": values for name, values in _module.ATTRIBUTES.items()})
"""Every label there is: head name -> its classes."""
GROUPS = ("composition", "surface")


def group_of(head: str) -> str | None:
    """Whether a label is of the "composition" or a "surface"; None for the kind of scene itself."""
    if head == "kind":
        return None
    return "surface" if kind_of(head) == "surface" else "composition"


def kind_of(head: str) -> str:
    """What a label tells: "count", "place" or "relation" of something, "surface" or "kind" of scene."""
    kind, _, name = head.partition(".")
    return KINDS[kind].LAYOUT.get(name, "surface") if name else kind


def labels(scenes: list[Scene], said: list[dict[str, str]] | None = None) -> Tensor:
    """Class index of every head, int64 [N, heads]; -1 where the scene has no such attribute.

    Args:
        said: with it, attributes a caption leaves out get the extra class `len(values)`.
    """
    columns = []
    for head, values in HEADS.items():
        column = []
        for i, scene in enumerate(scenes):
            kind, _, name = head.partition(".")
            if head == "kind":
                column.append(values.index(scene.kind))
            elif kind != scene.kind:
                column.append(-1)
            elif said is not None and name not in said[i]:
                column.append(len(values))
            elif name not in scene.attributes:
                column.append(-1)
            else:
                column.append(values.index(scene.attributes[name]))
        columns.append(torch.tensor(column))
    return torch.stack(columns, 1)


class AttributeHeads(nn.Module):
    """One linear classifier a head. `unsaid`: with the extra class for what a caption leaves out."""

    def __init__(self, width: int, unsaid: bool = False) -> None:
        super().__init__()
        names = {head: head.replace(".", "_") for head in HEADS}
        self.names = names
        self.linears = nn.ModuleDict(
            {
                names[head]: nn.Linear(width, len(values) + (unsaid and head != "kind"))
                for head, values in HEADS.items()
            }
        )

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """float [N, width] -> head name -> logits [N, classes]."""
        return {head: self.linears[name](features) for head, name in self.names.items()}


def heads_loss(logits: dict[str, Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over what applies, and the accuracy there: [] each.

    target: [N, heads], integers, as `labels` has them.
    """
    losses, right = [], []
    for place, values in enumerate(logits.values()):
        own = target[:, place].long()
        losses.append(F.cross_entropy(values, own, ignore_index=-1, reduction="sum"))
        right.append((values.argmax(-1) == own).sum())
    count = (target >= 0).sum().clamp_min(1)
    return torch.stack(losses).sum() / count, torch.stack(right).sum() / count


class ImageEncoder(nn.Module):
    """A small convolutional network: float [N, 3, 64, 64] in -1..1 -> features [N, width].

    Beside the last stage, which knows where things are, every stage's mean over the picture is read: things
    are counted by adding up what finds them, wherever they stand.
    """

    def __init__(self, width: int = 128, channels: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        previous = 3
        for count in channels:
            down, within = (
                nn.Conv2d(previous, count, 3, stride=2, padding=1),
                nn.Conv2d(count, count, 3, padding=1, groups=8),
            )
            norms = nn.GroupNorm(8, count), nn.GroupNorm(8, count)
            self.stages.append(nn.Sequential(down, norms[0], nn.SiLU(), within, norms[1], nn.SiLU()))
            previous = count
        self.project = nn.Linear(previous * 16 + sum(channels), width)

    def layers(self) -> list[nn.Module]:
        """Of all stages, in order."""
        return [layer for stage in self.stages for layer in cast(nn.Sequential, stage)]

    def forward(self, images: Tensor) -> Tensor:
        means = []
        for stage in self.stages:
            images = stage(images)
            means.append(images.mean((2, 3)))
        return self.project(torch.cat([images.flatten(1), *means], 1))


class AttributeReader(nn.Module):
    """Image encoder with attribute heads."""

    def __init__(self, width: int = 128, channels: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        super().__init__()
        self.encoder = ImageEncoder(width, channels)
        self.heads = AttributeHeads(width)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features [N, width] and logits a head."""
        features = self.encoder(images)
        return features, self.heads(F.silu(features))


_MOST_SHIFT = 2


def augment(images: Tensor, draws: Draws, strength: float) -> Tensor:
    """Shifts, blur, noise and tone changes, so that a classifier reads content and not pixel statistics."""
    images = _shifted(images, *(draws.integers(f"shift {axis}", 2 * _MOST_SHIFT + 1) for axis in "yx"))
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    images = torch.where(_each(draws.uniform("blur") < 0.4), blurred, images)
    tones = torch.stack([draws.uniform(f"tone {channel}") for channel in range(3)], 1).float()
    gain = 1 + strength * 0.3 * (2 * tones[:, :, None, None] - 1)
    amount = _each(strength * 0.3 * draws.uniform("noise").float())
    return images * gain + amount * philox_normal(images.shape, draws.seeds("pixels"))


def _shifted(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Each of [B, C, H, W] cut out of itself with its borders repeated, so many pixels from the corner."""
    height, width = images.shape[2:]
    padded = F.pad(images, (_MOST_SHIFT,) * 4, mode="replicate").permute(0, 2, 3, 1)
    which = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[which, *windows(down, right, height, width)].permute(0, 3, 1, 2)


def windows(top: Tensor, left: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows [B, height, 1] and columns [B, 1, width] of each sample's window, from its corner: [B] each."""
    down, right = (torch.arange(side, device=top.device) for side in (height, width))
    return top[:, None, None] + down[:, None], left[:, None, None] + right


def _each(values: Tensor) -> Tensor:
    """[B] to [B, 1, 1, 1]."""
    return values[:, None, None, None]
