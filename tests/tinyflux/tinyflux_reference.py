"""The student's mathematics, operation by operation from its tensors alone, in float64 and in no hurry."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


class Reference:
    """`Reference(config, state_dict)(**inputs)` is the velocity [B, N, C] in float64."""

    def __init__(self, config, state):
        self.c, self.s = config, {name: tensor.double() for name, tensor in state.items()}

    def linear(self, name, x):
        return F.linear(x, self.s[f"{name}.weight"], self.s.get(f"{name}.bias"))

    def norm(self, name, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.s[f"{name}.weight"]

    def mlp(self, name, x):
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x), approximate="tanh"))

    def layers(self, name, numbers, x):
        for i in numbers:
            x = self.linear(f"{name}.{i}", x if i == 0 else F.silu(x))
        return x

    def time(self, t):
        k = torch.arange(128, dtype=torch.float64)
        angles = self.c.time_factor * t[:, None] * torch.exp(-math.log(1e4) / 127 * k)
        return self.layers("time_in.mlp", (0, 2), torch.cat([angles.sin(), angles.cos()], -1))

    def text_vector(self, text, pooled, mask):
        clip = self.linear("vector_in.1", F.silu(pooled))
        if not self.c.use_t5_vec:
            return clip
        logits = text.mean(-1)
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        t5 = self.layers("t5_pool", (0, 2), (logits.softmax(-1)[..., None] * text).sum(1))
        balance = self.s["text_balance"].sigmoid()
        return balance * clip + (1 - balance) * t5

    def lune(self, both, features):
        predicted = self.layers(
            "lune_predictor.predictor", (1, 4, 6), self.linear("lune_predictor.input_proj", both)
        )
        features = predicted if features is None else features
        weight, bias = (self.s[f"lune_predictor.output_proj.0.{n}"] for n in ("weight", "bias"))
        normed = F.layer_norm(features, features.shape[-1:], weight, bias)
        return self.s["lune_predictor.expert_gate"].sigmoid() * self.linear(
            "lune_predictor.output_proj.1", normed
        )

    def sol(self, both, t, stats, spatial):
        side, heads = self.c.sol_spatial_size, self.c.num_attention_heads
        stats = self.layers("sol_prior.stat_predictor", (0, 2, 4), both) if stats is None else stats
        logits = self.layers("sol_prior.spatial_predictor", (0, 2, 4), both)
        axis = torch.linspace(-1, 1, side, dtype=torch.float64)
        centre = torch.exp(-2 * torch.hypot(*torch.meshgrid(axis, axis, indexing="ij")))
        if self.c.unit_mean_map:
            predicted = logits.softmax(-1) * side**2
            centre = centre / centre.mean()
            spatial = None if spatial is None else spatial / spatial.mean((1, 2), keepdim=True)
        else:
            predicted = logits.sigmoid()
        spatial = predicted.view(-1, side, side) if spatial is None else spatial
        learned = F.softplus(self.layers("sol_prior.stat_to_temperature", (0, 2), stats))
        spread = torch.linspace(-0.2, 0.2, heads, dtype=torch.float64)
        geometric = (1 + t[:, None] + spread).clamp(0.5, 3)
        blend = self.s["sol_prior.blend_gate"].sigmoid()
        temperature = blend * geometric + (1 - blend) * learned
        t = t[:, None, None]
        return temperature, blend * (t + (1 - t) * centre) + (1 - blend) * spatial

    def heads(self, name, x):
        return (
            self.linear(name, x)
            .unflatten(-1, (3, self.c.num_attention_heads, -1))
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )

    def head_norms(self, prefix, q, k):
        if not self.c.qk_norm:
            return q, k
        return self.norm(f"{prefix}norm_q", q), self.norm(f"{prefix}norm_k", k)

    def rotate(self, x, ids):
        angles = torch.cat([ids[:, i : i + 1] * self.s[f"rope.freqs_{i}"] for i in range(3)], -1)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angles)
        return torch.view_as_real(turned).flatten(-2)

    def map_factor(self, name, sol):
        resized = F.interpolate(sol[1][:, None], size=self.size, mode="bilinear", align_corners=False)
        weight, bias = self.s[f"{name}.spatial_to_mod.weight"], self.s[f"{name}.spatial_to_mod.bias"]
        return F.conv2d(resized, weight, bias).clamp(-2, 2).exp().flatten(2)[..., None]

    def attend(self, q, k, v, divisor, mask):
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) / divisor
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], -math.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def temperature(self, sol):
        if sol is None:
            return 1.0
        temperature = sol[0] if self.c.head_temperature else sol[0].mean(1, keepdim=True)
        return temperature.clamp(min=0.1)[:, :, None, None]

    def double(self, name, txt, img, vec, ids, sol, mask):
        rows = {
            s: self.linear(f"{name}.{s}_norm1.linear", F.silu(vec))[:, None].chunk(6, -1)
            for s in ("txt", "img")
        }
        x, qkv = {"txt": txt, "img": img}, {}
        for s, (shift, scale, *_) in rows.items():
            q, k, v = self.heads(
                f"{name}.attn.{s}_qkv", self.norm(f"{name}.{s}_norm1.norm", x[s]) * (1 + scale) + shift
            )
            qkv[s] = *self.head_norms(f"{name}.attn.{s}_", q, k), v
        q, k, v = qkv["img"]
        factor = 1.0 if sol is None else self.map_factor(f"{name}.attn", sol)
        q, k = self.rotate(q, ids) * factor, self.rotate(k, ids) * factor
        k, v = torch.cat([qkv["txt"][1], k], 2), torch.cat([qkv["txt"][2], v], 2)
        of = {
            "txt": self.attend(qkv["txt"][0], k, v, 1.0, mask),
            "img": self.attend(q, k, v, self.temperature(sol), mask),
        }
        for s, (_, _, gate, shift, scale, mlp_gate) in rows.items():
            x[s] = x[s] + gate * self.linear(f"{name}.attn.{s}_out", of[s])
            inner = self.norm(f"{name}.{s}_norm2", x[s]) * (1 + scale) + shift
            x[s] = x[s] + mlp_gate * self.mlp(f"{name}.{s}_mlp", inner)
        return x["txt"], x["img"]

    def single(self, name, x, length, vec, ids, sol, mask):
        shift, scale, gate = self.linear(f"{name}.norm.linear", F.silu(vec))[:, None].chunk(3, -1)
        q, k, v = self.heads(f"{name}.attn.qkv", self.norm(f"{name}.norm.norm", x) * (1 + scale) + shift)
        q, k = self.head_norms(f"{name}.attn.", q, k)
        q, k = self.rotate(q, ids), self.rotate(k, ids)
        if sol is not None:
            factor = self.map_factor(f"{name}.attn", sol)
            factor = torch.cat([factor.new_ones(*factor.shape[:2], length, 1), factor], 2)
            q, k = q * factor, k * factor
        out = self.attend(q, k, v, self.temperature(sol), mask)
        x = x + gate * self.linear(f"{name}.attn.out_proj", out)
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x))

    def __call__(
        self,
        hidden_states,
        encoder_hidden_states,
        pooled_projections,
        timestep,
        size,
        encoder_attention_mask=None,
        lune_features=None,
        sol_stats=None,
        sol_spatial=None,
    ):
        double = lambda x: None if x is None else x.double()  # noqa: E731
        self.size, mask = size, encoder_attention_mask
        text, pooled, t = double(encoder_hidden_states), double(pooled_projections), double(timestep)
        time = self.time(t)
        vec, both = time + self.text_vector(text, pooled, mask), torch.cat([time, pooled], -1)
        if self.c.use_lune_expert:
            vec = vec + self.lune(both, double(lune_features))
        sol = self.sol(both, t, double(sol_stats), double(sol_spatial)) if self.c.use_sol_prior else None
        img, txt = self.linear("img_in", double(hidden_states)), self.linear("txt_in", text)
        y, x = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
        ids = torch.stack([torch.zeros_like(y), y, x], -1).flatten(0, 1).double()
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), len(ids))], 1)
        for i in range(self.c.num_double_layers):
            txt, img = self.double(f"double_blocks.{i}", txt, img, vec, ids, sol, mask)
        length = txt.shape[1]
        ids, x = torch.cat([ids.new_zeros(length, 3), ids]), torch.cat([txt, img], 1)
        for i in range(self.c.num_single_layers):
            x = self.single(f"single_blocks.{i}", x, length, vec, ids, sol, mask)
        return self.linear("final_linear", self.norm("final_norm", x[:, length:]))
