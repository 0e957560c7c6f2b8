"""What all blocks of a forward pass share, computed once: rotary tables, the mask, Sol's factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AttentionInputs", "RotaryFrequencies", "attention_inputs", "sol_factors"]

_THETA = 10000.0
_LARGEST_LOG = 2.0  # of a map's factor


class AttentionInputs(NamedTuple):
    """What all blocks of a forward pass share, over L text tokens and then N image tokens.

    cos, sin: float32 [L + N, head_dim / 2]. text_factor: [B, 1, 3, heads, 1], for the text's q, k and v in
    double blocks, or None. mask: bool [B, 1, 1, L + N], True where a token counts, or None.
    """

    cos: Tensor
    sin: Tensor
    text_factor: Tensor | None
    mask: Tensor | None


class RotaryFrequencies(nn.Module):
    """Angles of token positions, Su et al. (2021), on several axes.

    The frequencies are buffers because published checkpoints hold them, and stay float32 when the model is
    cast: in bfloat16, whose steps at 40 are 1/4, neighbours would share angles.
    """

    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        for i, dim in enumerate(axes):
            exponent = torch.arange(0, dim, 2, dtype=torch.float32) / max(dim, 1)
            self.register_buffer(f"freqs_{i}", 1.0 / _THETA**exponent)

    def _apply(self, fn, recurse: bool = True):
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, cast in list(self.named_buffers(recurse=False)):
            if cast.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = exact[name].to(cast.device)
        return self

    def forward(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [tokens, head_dim / 2] of `dtype`; ids: [tokens, axes]."""
        ids = ids.to(dtype)
        axes = [freqs for freqs in self._buffers.values() if freqs is not None]
        angles = torch.cat([ids[:, i : i + 1] * freqs.to(dtype) for i, freqs in enumerate(axes)], -1)
        return angles.cos(), angles.sin()


def attention_inputs(
    rope: RotaryFrequencies,
    img_ids: Tensor,
    txt_ids: Tensor | None,
    length: int,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> tuple[AttentionInputs, AttentionInputs]:
    """What double blocks, which leave the text where it is, and what single blocks share.

    img_ids: [N, 3] or [B, N, 3], of which the first sample's count; txt_ids: [L, 3], [B, L, 3] or None for
    zeros. mask: bool [B, L] or None. dtype: of the tables.
    """
    img_ids = img_ids if img_ids.ndim == 2 else img_ids[0]
    cos, sin = still_cos, still_sin = rope(torch.cat([img_ids.new_zeros(length, 3), img_ids]), dtype)
    if txt_ids is not None:
        txt_ids = txt_ids if txt_ids.ndim == 2 else txt_ids[0]
        cos, sin = rope(torch.cat([txt_ids.to(dtype), img_ids.to(dtype)]), dtype)
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), len(img_ids))], 1)[:, None, None]
    return AttentionInputs(still_cos, still_sin, None, mask), AttentionInputs(cos, sin, None, mask)


def sol_factors(
    double: Sequence[nn.Conv2d],
    single: Sequence[nn.Conv2d],
    temperature: Tensor,
    importance: Tensor,
    size: tuple[int, int],
    length: int,
) -> tuple[Tensor, list[Tensor]]:
    """Sol's map and temperature as factors of queries and keys alone, so that attention needs no others.

    With m a block's factor of an image token and T the temperature, the logits of image tokens i, j shall be
    m_i·m_j/T·(q_i·k_j), with m = 1 for text, and in double blocks without 1/T where text asks. So q and k are
    multiplied by m/√T; in double blocks the text's q by √T instead and its k by 1/√T.

    Args:
        double, single: each block's map from importance to ln(m), clamped to ±2: a weight and a bias a head.
        temperature: [B, heads], no less than 0.1 is used. importance: [B, S, S].
        size, length: (H, W) of the image, L of the text.

    Returns:
        The text's factor of q, k and v in double blocks, [B, 1, 3, heads, 1], and every block's factor of q
        and k, [B, heads, L + N], double blocks first; in temperature's dtype.
    """
    half_log = 0.5 * temperature.clamp_min(0.1).log()
    blocks, exact = [*double, *single], half_log.dtype
    weight = torch.stack([block.weight.view(1, -1, 1) for block in blocks]).to(exact)
    biases = [block.bias for block in blocks if block.bias is not None]
    bias = torch.stack([of_block.view(1, -1, 1) for of_block in biases]).to(exact)
    resized = F.interpolate(importance[:, None], size=size, mode="bilinear").flatten(2)
    logs = (weight * resized + bias).clamp(-_LARGEST_LOG, _LARGEST_LOG) - half_log[..., None]
    of_double = F.pad(logs[: len(double)], (length, 0)).exp()
    of_text = (-half_log[..., None]).expand(len(single), -1, -1, length)
    of_single = torch.cat([of_text, logs[len(double) :]], -1).exp()
    root = half_log.exp()
    factor = torch.stack([root, 1 / root, torch.ones_like(root)], 1)[:, None, ..., None]
    return factor, [*of_double.unbind(0), *of_single.unbind(0)]
