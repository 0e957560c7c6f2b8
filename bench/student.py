"""A training step of the student beside the same blocks computed as upstream's TinyFlux computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import DEVICE, OURS, Call, Comparison
from moe_sampler.kernels.losses import weighted_mse
from moe_sampler.tinyflux import TinyFlux, TinyFluxConfig
from moe_sampler.tinyflux.model.dense import Linear
from moe_sampler.tinyflux.model.layers import (
    MLP,
    Attention,
    DoubleBlock,
    JointAttention,
    RMSNorm,
    SingleBlock,
)

SUITE = "student"


@dataclass(frozen=True)
class Work:
    """A model and what it is trained on: batch, side of the latents, tokens of text, precision of all."""

    settings: Mapping[str, Any]
    batch: int
    side: int
    length: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        s = TinyFluxConfig.deep_v4(**self.settings)
        blocks = f"{s.num_double_layers} + {s.num_single_layers} blocks"
        latents = f"{self.side}x{self.side} latents"
        return f"hidden {s.hidden_size}, {blocks}, {latents}, {self.length} text tokens"


MIDDLE = Work(
    {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "num_double_layers": 4,
        "num_single_layers": 6,
        "axes_dims_rope": (16, 24, 24),
        "lune_dropout": 0.0,
    },
    batch=8,
    side=16,
    length=64,
)


def new_model(work: Work = MIDDLE) -> TinyFlux:
    """The model with weights that make every part of it count."""
    torch.manual_seed(0)
    model = TinyFlux(TinyFluxConfig.deep_v4(**work.settings)).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(work.dtype)


def new_inputs(model: TinyFlux, work: Work = MIDDLE) -> tuple[dict[str, Tensor], Tensor]:
    """(What the model eats, the velocity it should predict)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(work.batch, *shape, generator=generator).to(DEVICE, work.dtype)

    config = model.config
    inputs = {
        "hidden_states": draw(work.side**2, config["in_channels"]),
        "encoder_hidden_states": draw(work.length, config["joint_attention_dim"]),
        "pooled_projections": draw(config["pooled_projection_dim"]),
        "timestep": torch.linspace(0.05, 0.95, work.batch, device=DEVICE),
    }
    return inputs, draw(work.side**2, config["in_channels"])


# Upstream's way: the same weights, operation by operation, everything anew in every block.


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return (x * (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * norm.weight


def _modulated(x: Tensor, norm: RMSNorm, scale: Tensor, shift: Tensor) -> Tensor:
    return _norm(x, norm) * (1 + scale[:, None]) + shift[:, None]


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    cos, sin = (part.repeat_interleave(2, -1) for part in turns.unbind(-1))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x.float() * cos + torch.stack([-odd, even], -1).flatten(-2).float() * sin).to(x.dtype)


def _turns(model: TinyFlux, ids: Tensor) -> Tensor:
    angles = [ids[:, i : i + 1].float() * freqs for i, freqs in enumerate(model.rope.buffers())]
    return torch.stack([torch.cat(angles, -1).cos(), torch.cat(angles, -1).sin()], -1)


def _heads(x: Tensor, projection: nn.Linear, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _linear(x, projection).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _map_factor(attention: JointAttention | Attention, spatial: Tensor, side: int) -> Tensor:
    resized = F.interpolate(spatial[:, None], size=(side, side), mode="bilinear", align_corners=False)
    to_heads = attention.spatial_to_mod
    return to_heads(resized.to(to_heads.weight.dtype)).flatten(2).clamp(-2, 2).exp()[..., None]


def _scale(temperature: Tensor, like: Tensor) -> Tensor:
    scale = (like.shape[-1] ** -0.5 / temperature.mean(1).clamp(min=0.1)).sqrt()
    return scale.to(like.dtype).view(-1, 1, 1, 1)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _mlp(x: Tensor, mlp: MLP) -> Tensor:
    return _linear(F.gelu(_linear(x, mlp.fc1), approximate="tanh"), mlp.fc2)


def _double(
    block: DoubleBlock, txt: Tensor, img: Tensor, vec: Tensor, turns: Tensor, sol
) -> tuple[Tensor, Tensor]:
    rows = [_linear(F.silu(vec), norm.linear).chunk(6, -1) for norm in (block.txt_norm1, block.img_norm1)]
    attention, heads = block.attn, block.attn.shape[1]
    txt_in = _modulated(txt, block.txt_norm1.norm, rows[0][1], rows[0][0])
    img_in = _modulated(img, block.img_norm1.norm, rows[1][1], rows[1][0])
    txt_q, txt_k, txt_v = _heads(txt_in, attention.txt_qkv, heads)
    img_q, img_k, img_v = _heads(img_in, attention.img_qkv, heads)
    factor = _map_factor(attention, sol.importance, math.isqrt(img.shape[1]))
    img_q, img_k = _rotate(img_q, turns) * factor, _rotate(img_k, turns) * factor
    k, v = torch.cat([txt_k, img_k], 2), torch.cat([txt_v, img_v], 2)
    of_txt = F.scaled_dot_product_attention(txt_q, k, v)
    scale = _scale(sol.temperature, k)
    of_img = F.scaled_dot_product_attention(img_q * scale, k * scale, v, scale=1.0)
    txt = txt + rows[0][2][:, None] * _linear(_merged(of_txt), attention.txt_out)
    img = img + rows[1][2][:, None] * _linear(_merged(of_img), attention.img_out)
    txt_in = _modulated(txt, block.txt_norm2, rows[0][4], rows[0][3])
    img_in = _modulated(img, block.img_norm2, rows[1][4], rows[1][3])
    txt = txt + rows[0][5][:, None] * _mlp(txt_in, block.txt_mlp)
    return txt, img + rows[1][5][:, None] * _mlp(img_in, block.img_mlp)


def _single(
    block: SingleBlock, txt: Tensor, img: Tensor, vec: Tensor, turns: Tensor, sol
) -> tuple[Tensor, Tensor]:
    x, length = torch.cat([txt, img], 1), txt.shape[1]
    shift, scale, gate = _linear(F.silu(vec), block.norm.linear).chunk(3, -1)
    q, k, v = _heads(_modulated(x, block.norm.norm, scale, shift), block.attn.qkv, block.attn.shape[1])
    factor = _map_factor(block.attn, sol.importance, math.isqrt(img.shape[1]))
    factor = torch.cat([factor.new_ones(*factor.shape[:2], length, 1), factor], 2)
    q, k = _rotate(q, turns) * factor, _rotate(k, turns) * factor
    scale = _scale(sol.temperature, k)
    out = F.scaled_dot_product_attention(q * scale, k * scale, v, scale=1.0)
    x = x + gate[:, None] * _linear(_merged(out), block.attn.out_proj)
    x = x + _mlp(_norm(x, block.norm2), block.mlp)
    return x[:, :length], x[:, length:]


def upstreams_forward(
    model: TinyFlux,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
) -> Tensor:
    """The velocity [B, N, C] that `model(...)` predicts, of square latents."""
    time = model.time_in(timestep)
    vec = time + model._text_vector(encoder_hidden_states, pooled_projections, None)
    both = torch.cat([time, pooled_projections], -1)
    assert model.lune_predictor is not None and model.sol_prior is not None
    vec = vec + model.lune_predictor(both, None)[0]
    sol = model.sol_prior(both, timestep, None, None)
    img, txt = _linear(hidden_states, model.img_in), _linear(encoder_hidden_states, model.txt_in)
    side = math.isqrt(img.shape[1])
    ids = model.create_img_ids(side, side, device=img.device)
    turns = _turns(model, ids)
    for block in model.double_blocks:
        txt, img = _double(cast(DoubleBlock, block), txt, img, vec, turns, sol)
    turns = _turns(model, torch.cat([ids.new_zeros(txt.shape[1], 3), ids]))
    for block in model.single_blocks:
        txt, img = _single(cast(SingleBlock, block), txt, img, vec, turns, sol)
    return _linear(_norm(img, model.final_norm), model.final_linear)


# Steps


def _ours(work: Work, checkpointing: bool = False, linear: type[nn.Linear] = Linear) -> Callable[[], Call]:
    def make() -> Call:
        model = new_model(work)
        if checkpointing:
            model.enable_gradient_checkpointing()
        for module in model.modules():
            if type(module) is Linear:
                module.__class__ = linear  # pyright: ignore[reportAttributeAccessIssue] - its base, alike but for forward
        return _step(model, work, lambda inputs: model(**inputs).sample, weighted_mse)

    return make


def _upstreams(work: Work) -> Call:
    model = new_model(work)
    inputs, _ = new_inputs(model, work)
    tolerance = 1e-4 if work.dtype == torch.float32 else 0.1
    with torch.no_grad():
        theirs, ours = upstreams_forward(model, **inputs), model(**inputs).sample
    torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)
    return _step(model, work, lambda inputs: upstreams_forward(model, **inputs), F.mse_loss)


def _step(
    model: TinyFlux,
    work: Work,
    predict: Callable[[dict], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Call:
    """Forward, loss and the gradient of every parameter that is used."""
    inputs, target = new_inputs(model, work)
    parameters = [p for name, p in model.named_parameters() if "spatial_to_qk_scale" not in name]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(predict(inputs), target), parameters, allow_unused=True)

    return step


def comparison(work: Work) -> Comparison:
    case = {
        "operation": "training step",
        "variant": str(work),
        "shape": f"batch {work.batch}",
        "dtype": str(work.dtype).removeprefix("torch."),
    }
    providers = {
        OURS: _ours(work),
        f"{OURS}, torch's linear layers": _ours(work, linear=nn.Linear),
        f"{OURS}, checkpointing": _ours(work, checkpointing=True),
        "upstream's way": lambda: _upstreams(work),
    }
    return Comparison(SUITE, case, providers, memory=True, slow=True)


def comparisons() -> Iterator[Comparison]:
    yield comparison(MIDDLE)
