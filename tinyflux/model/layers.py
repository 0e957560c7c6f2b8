"""The student's blocks: joint attention over text and image in two streams, then in one."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_sampler.kernels.modulation import rms_norm_modulate
from moe_sampler.kernels.rotary import rope_qk
from moe_sampler.tinyflux.model.conditioning import AttentionInputs
from moe_sampler.tinyflux.model.config import TinyFluxConfig
from moe_sampler.tinyflux.model.dense import linear

__all__ = ["DoubleBlock", "RMSNorm", "SingleBlock", "TimeEmbedding"]

_THETA = 10000.0


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x²) + 1e-6) * weight * (1 + scale) + shift; x: [B, N, D], scale, shift: [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return rms_norm_modulate(x, self.weight, scale, shift)


class HeadNorm(nn.Module):
    """RMSNorm over a head's dimensions, the last of x, whatever its strides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


class TimeEmbedding(nn.Module):
    """An MLP of sin ‖ cos of factor * t * exp(-ln(10⁴) / 127 * k), k = 0..127, in float32 up to the MLP."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.mlp = nn.Sequential(linear(256, width), nn.SiLU(), linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """[B, width] in the weights' dtype; t: [B], float32 or float64."""
        k = torch.arange(128, dtype=t.dtype, device=t.device)
        angles = self.factor * t[:, None] * torch.exp(k * (-math.log(_THETA) / 127))
        first = cast(nn.Linear, self.mlp[0])
        return self.mlp(torch.cat([angles.sin(), angles.cos()], -1).to(first.weight.dtype))


class AdaNorm(nn.Module):
    """RMSNorm and its modulation, `chunks` rows [B, D] of the conditioning: Peebles and Xie's AdaLN-Zero."""

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = linear(width, chunks * width, gain=0.0)
        self.norm = RMSNorm(width)

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """conditioning: SiLU(vec), [B, D]."""
        return self.linear(conditioning).chunk(self.chunks, -1)


class MLP(nn.Module):
    def __init__(self, width: int, ratio: float, *, gain: float = 1.0) -> None:
        super().__init__()
        self.fc1 = linear(width, int(width * ratio))
        self.fc2 = linear(int(width * ratio), width, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Heads(nn.Module):
    """What both kinds of attention do once queries, keys and values of all tokens lie side by side."""

    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__()
        self.shape = (3, config.num_attention_heads, config.attention_head_dim)
        self.qk_norm = config.qk_norm
        if config.use_sol_prior:
            # Holds one weight and one bias a head; the model evaluates those of all blocks at once.
            self.spatial_to_mod = nn.Conv2d(1, config.num_attention_heads, kernel_size=1)
            for parameter in self.spatial_to_mod.parameters():
                nn.init.zeros_(parameter)

    def _project(self, x: Tensor, qkv: nn.Linear, norms: tuple[HeadNorm, HeadNorm] | None) -> Tensor:
        """[B, tokens, 3, heads, head_dim] of x: [B, tokens, D]."""
        packed = qkv(x).unflatten(-1, self.shape)
        if norms is None:
            return packed
        q, k, v = packed.unbind(2)
        return torch.stack([norms[0](q), norms[1](k), v], 2)

    def _attend(self, packed: Tensor, shared: AttentionInputs, modulation: Tensor | None) -> Tensor:
        """[B, tokens, D]. packed: [B, tokens, 3, heads, head_dim]. modulation: [B, heads, tokens] or None."""
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rope_qk(q, k, shared.cos, shared.sin, modulation)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=shared.mask)
        return out.transpose(1, 2).flatten(2)


class JointAttention(_Heads):
    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__(config)
        width, head = config.hidden_size, config.attention_head_dim
        self.txt_qkv = linear(width, 3 * width, bias=False)
        self.img_qkv = linear(width, 3 * width, bias=False)
        self.txt_out = linear(width, width, bias=False)
        self.img_out = linear(width, width, bias=False)
        if self.qk_norm:
            self.txt_norm_q, self.txt_norm_k = HeadNorm(head), HeadNorm(head)
            self.img_norm_q, self.img_norm_k = HeadNorm(head), HeadNorm(head)

    def forward(
        self, txt: Tensor, img: Tensor, shared: AttentionInputs, modulation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        txt_norms = (self.txt_norm_q, self.txt_norm_k) if self.qk_norm else None
        img_norms = (self.img_norm_q, self.img_norm_k) if self.qk_norm else None
        of_text = self._project(txt, self.txt_qkv, txt_norms)
        if shared.text_factor is not None:
            of_text = of_text * shared.text_factor.to(of_text.dtype)
        packed = torch.cat([of_text, self._project(img, self.img_qkv, img_norms)], 1)
        txt, img = self._attend(packed, shared, modulation).split([txt.shape[1], img.shape[1]], 1)
        return self.txt_out(txt), self.img_out(img)


class Attention(_Heads):
    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.qkv = linear(width, 3 * width, bias=False)
        self.out_proj = linear(width, width, bias=False)
        if self.qk_norm:
            self.norm_q, self.norm_k = (HeadNorm(config.attention_head_dim) for _ in range(2))

    def forward(self, x: Tensor, shared: AttentionInputs, modulation: Tensor | None) -> Tensor:
        norms = (self.norm_q, self.norm_k) if self.qk_norm else None
        return self.out_proj(self._attend(self._project(x, self.qkv, norms), shared, modulation))


def _gated(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """x + gate * change; x, change: [B, tokens, D], gate: [B, D]."""
    return torch.addcmul(x, gate[:, None], change)


class DoubleBlock(nn.Module):
    """Text and image attend to each other, each with weights of its own. The identity at first."""

    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.img_norm1, self.txt_norm1 = AdaNorm(width, 6), AdaNorm(width, 6)
        self.attn = JointAttention(config)
        self.img_norm2, self.txt_norm2 = RMSNorm(width), RMSNorm(width)
        self.img_mlp, self.txt_mlp = MLP(width, config.mlp_ratio), MLP(width, config.mlp_ratio)

    def forward(
        self,
        txt: Tensor,
        img: Tensor,
        conditioning: Tensor,
        shared: AttentionInputs,
        modulation: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """txt: [B, L, D], img: [B, N, D], in and out. conditioning: SiLU(vec), [B, D]. modulation: float32
        [B, heads, L + N] or None."""
        shift, scale, gate, img_shift, img_scale, img_gate = self.img_norm1(conditioning)
        img_in = self.img_norm1.norm(img, scale, shift)
        shift, scale, txt_attn_gate, txt_shift, txt_scale, txt_gate = self.txt_norm1(conditioning)
        txt_in = self.txt_norm1.norm(txt, scale, shift)
        of_txt, of_img = self.attn(txt_in, img_in, shared, modulation)
        txt, img = _gated(txt, txt_attn_gate, of_txt), _gated(img, gate, of_img)
        txt = _gated(txt, txt_gate, self.txt_mlp(self.txt_norm2(txt, txt_scale, txt_shift)))
        img = _gated(img, img_gate, self.img_mlp(self.img_norm2(img, img_scale, img_shift)))
        return txt, img


class SingleBlock(nn.Module):
    """One stream of text and image tokens; the MLP has no gate. The identity at first."""

    def __init__(self, config: TinyFluxConfig) -> None:
        super().__init__()
        self.norm = AdaNorm(config.hidden_size, 3)
        self.attn = Attention(config)
        self.mlp = MLP(config.hidden_size, config.mlp_ratio, gain=0.0)
        self.norm2 = RMSNorm(config.hidden_size)

    def forward(
        self, x: Tensor, conditioning: Tensor, shared: AttentionInputs, modulation: Tensor | None
    ) -> Tensor:
        """x: [B, L + N, D], in and out. conditioning: SiLU(vec), [B, D]. modulation: float32
        [B, heads, L + N] or None."""
        shift, scale, gate = self.norm(conditioning)
        x = _gated(x, gate, self.attn(self.norm.norm(x, scale, shift), shared, modulation))
        return x + self.mlp(self.norm2(x))
