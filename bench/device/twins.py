"""What each kernel should have written, from the formulas in the kernels' docstrings, in any precision.

A formula takes the launch's arguments by the names its kernel gives them, without `_ptr`, and returns what is
written by the same names. With float64 tensors it is the reference; with the launch's own tensors it is eager
torch in that precision.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_sampler.kernels.rows import COLUMNS, MOST_EXPERTS, MOST_MEMORIES

__all__ = ["FORMULAS", "LONG_SUMS", "named_arguments", "prepare"]

Arguments = Mapping[str, Any]
Formula = Callable[[Arguments], dict[str, Tensor]]


def named_arguments(launch: Any) -> dict[str, Any]:
    """A launch's arguments by name, its compile-time constants among them."""
    names = [name.removesuffix("_ptr") for name in launch.kernel.arg_names]
    return dict(zip(names, launch.args, strict=False)) | launch.constants


def normal(seeds: Tensor, step: int, stream: int, like: Tensor) -> Tensor:
    """`kernels.noise`'s N(0, 1) noise from NumPy's Philox: float64 where `like` is, else in float32."""
    count = math.prod(like.shape[1:])
    words = np.stack(
        [
            np.random.Philox(
                key=np.array([seed & (1 << 64) - 1, 0], np.uint64),
                counter=np.array([0, step, stream, 0], np.uint64),
            ).random_raw((count + 1) // 2)
            for seed in seeds.tolist()
        ]
    )
    precision = torch.float64 if like.dtype == torch.float64 else torch.float32
    high = torch.from_numpy((words >> np.uint64(32)).astype(np.float64))
    low = torch.from_numpy((words & np.uint64(0xFFFFFFFF)).astype(np.float64))
    uniform = ((high + 0.5) * 2.0**-32).float().to(precision)  # the definition rounds it to float32
    angle = (low * (2 * math.pi * 2.0**-32)).to(precision)
    radius = torch.sqrt(-2 * torch.log(uniform))
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)
    return pairs.flatten(1)[:, :count].reshape(like.shape).to(like.device)


def _each(value: Tensor, like: Tensor) -> Tensor:
    """A number a sample, to multiply samples with."""
    return value.view(-1, *(1,) * (like.ndim - 1))


def _sampler_step(a: Arguments) -> dict[str, Tensor]:
    row: dict[str, float] = dict(zip(COLUMNS, a["table"][a["step"]].tolist(), strict=False))
    x = a["x"]
    x0 = row["p"] * x
    for i in range(MOST_EXPERTS):
        if a[f"output_{i}"] is None:
            continue
        parts = a[f"output_{i}"].chunk(2) if a[f"OUTPUT_{i}_GUIDED"] else (None, a[f"output_{i}"])
        for name, part in zip(("q_uncond", "q_cond"), parts, strict=True):
            x0 = x0 if part is None else x0 + row[f"{name}_{i}"] * part
    x0 = x0.clamp(-row["clip"], row["clip"])
    z = torch.zeros_like(x) if a["noise"] is None else a["noise"]
    if a["seeds"] is not None:
        z = normal(a["seeds"], a["step"], a["stream"], x)
    kept = row["keep_x"] * x + row["keep_x0"] * x0 + row["keep_n"] * z
    x = row["a"] * x + row["b"] * x0 + row["n"] * z
    memories = [f"memory_{i}" for i in range(MOST_MEMORIES) if a[f"memory_{i}"] is not None]
    for i, name in enumerate(memories):
        x = x + row[f"d_{i}"] * a[name]
    written = {memories[-1]: kept} if memories else {}
    if a["x0"] is not None:
        written["x0"] = x0
    for i in range(MOST_EXPERTS):
        if a[f"next_{i}"] is not None:
            scaled = row[f"scale_{i}"] * x
            written[f"next_{i}"] = torch.cat([scaled, scaled]) if a[f"NEXT_{i}_TWICE"] else scaled
    return {"x": x, **written}


def _epsilon(a: Arguments) -> dict[str, Tensor]:
    x, alpha, sigma = a["x"], _each(a["alpha"], a["x"]), _each(a["sigma"], a["x"])
    return {"epsilon": (sigma * x + alpha * a["velocity"]) / (alpha**2 + sigma**2)}


def _euler(a: Arguments) -> dict[str, Tensor]:
    return {"x": a["x"] - a["step_down"] * a["velocity"]}


def _shift(a: Arguments) -> dict[str, Tensor]:
    return {"out": a["shift"] * a["sigmas"] / (1 + (a["shift"] - 1) * a["sigmas"])}


def _noise(a: Arguments) -> dict[str, Tensor]:
    return {"out": normal(a["seeds"], a["step"], a["stream"], a["out"])}


def _pair(a: Arguments) -> dict[str, Tensor]:
    x0, level, written = a["x0"], a["level"], {}
    if a["alphas"] is None:
        sigma = a["shift"] * level / (1 + (a["shift"] - 1) * level)
        alpha = 1 - sigma
        written["timestep"] = a["timestep_scale"] * sigma
    else:
        alpha, sigma = a["alphas"][level], a["sigmas"][level]
    alpha, sigma = _each(alpha, x0), _each(sigma, x0)
    noise = normal(a["seeds"], a["step"], a["stream"], x0) if a["noise"] is None else a["noise"]
    targets = {"flow_prediction": noise - x0, "v_prediction": alpha * noise - sigma * x0}
    return {"noisy": alpha * x0 + sigma * noise, "target": targets[a["PREDICTION"]], **written}


def _loss(a: Arguments) -> dict[str, Tensor]:
    prediction = a["prediction"]
    difference = prediction - a["target"]
    residual = difference
    if a["map"] is not None:
        size = (a["height"], a["width"])
        spread = F.interpolate(a["map"][:, None], size, mode="bilinear", align_corners=False)
        residual = residual * (spread.flatten(2).mT if a["TOKENS"] else spread)
    if a["weight"] is not None:
        residual = residual * _each(a["weight"], prediction)
    if a["alpha"] is not None:
        alpha, sigma = a["alpha"], a["sigma"]
        smaller = torch.minimum(alpha**2, a["gamma"] * sigma**2)  # min-SNR for a flow's velocity
        residual = residual * _each(smaller / (alpha + sigma) ** 2, prediction)
    products = (residual * difference).flatten(1)
    rest = -products.shape[1] % a["BLOCK"]
    blocks = F.pad(products, (0, rest)).unflatten(1, (-1, a["BLOCK"]))
    return {"partial": a["share"] * blocks.sum(-1), "residual": residual}


def _loss_backward(a: Arguments) -> dict[str, Tensor]:
    slope = a["twice_share"] * _each(a["gradient"], a["residual"]) * a["residual"]
    return {"prediction": slope, "target": -slope}


def _multiplier(a: Arguments) -> Tensor:
    return (a["weight"] * (1 + a["scale"]))[:, None]


def _modulation(a: Arguments) -> dict[str, Tensor]:
    rstd = (a["x"].square().mean(-1) + a["eps"]).rsqrt()
    return {"y": a["x"] * rstd[..., None] * _multiplier(a) + a["shift"][:, None], "rstd": rstd}


def _modulation_backward(a: Arguments) -> dict[str, Tensor]:
    x_hat, g = a["x"] * a["rstd"][..., None], a["dy"] * _multiplier(a)
    dx = a["rstd"][..., None] * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    along, dshift = (
        F.pad(rows, (0, 0, 0, -rows.shape[1] % a["CHUNK"])).unflatten(1, (-1, a["CHUNK"])).sum(2)
        for rows in (a["dy"] * x_hat, a["dy"])
    )
    return {"dx": dx, "along": along, "dshift": dshift}


def _modulation_sums(a: Arguments) -> dict[str, Tensor]:
    along = a["along"].sum(1)
    return {
        "dweight": (along * (1 + a["scale"])).sum(0),
        "dscale": a["weight"] * along,
        "dshift": a["along_shift"].sum(1),
    }


def _rotary(a: Arguments) -> dict[str, Tensor]:
    cos, sin = a["cos"], -a["sin"] if a["BACK"] else a["sin"]

    def turned(x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    turned_q, turned_k = turned(a["in_q"]), turned(a["in_k"])
    factor = a["modulation"][..., None]
    written = {"out_q": factor * turned_q, "out_k": factor * turned_k}
    if a["dmodulation"] is not None:
        written["dmodulation"] = (turned_q * a["q"] + turned_k * a["k"]).sum(-1)
    return written


def _softmax_rows(a: Arguments) -> dict[str, Tensor]:
    """Sample by sample: all logits of a batch would be gigabytes."""
    parts = []
    for q, k in zip(a["q"], a["k"], strict=True):
        logits = (q @ k.mT) * a["scale"]
        largest = logits.amax(-1)
        parts.append((largest, a["share"] / torch.exp2(logits - largest[..., None]).sum(-1)))
    largest, weight = (torch.stack(part) for part in zip(*parts, strict=True))
    return {"largest": largest, "weight": weight}


def _received(a: Arguments) -> dict[str, Tensor]:
    width, tokens, parts = a["width"], a["q"].shape[2], a["parts"]
    place = torch.arange(tokens, device=a["q"].device)
    places = torch.stack([place // width, place % width], -1).to(a["weight"].dtype)
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    tiles, rest = -(-tokens // a["BLOCK_Q"]), -tokens % a["BLOCK_K"]
    ends = [min(tiles * part // parts * a["BLOCK_Q"], tokens) for part in range(parts + 1)]
    received, sums = [], []
    for q, k, largest, weight in zip(a["q"], a["k"], a["largest"], a["weight"], strict=True):
        logits = (q @ k.mT) * a["scale"]
        p = (weight[..., None] * torch.exp2(logits - largest[..., None])).sum(0)
        every = torch.stack([p, torch.special.xlogy(p, p), p * distance])
        of_keys = torch.stack([every[:, i:j].sum(1) for i, j in itertools.pairwise(ends)], 1)
        received.append(of_keys[0])
        sums.append(F.pad(of_keys[1:], (0, rest)).unflatten(-1, (-1, a["BLOCK_K"])).sum(-1).flatten(1))
    return {"received": torch.stack(received), "sums": torch.stack(sums, 1)}


def _attention_end(a: Arguments) -> dict[str, Tensor]:
    information, moved = a["sums"].sum(-1)
    return {
        "received": a["received_parts"].sum(1),
        "entropy": a["of_entropy"] * information,
        "locality": 1 + a["of_distance"] * moved,
    }


def _zero_star(a: Arguments) -> dict[str, Tensor]:
    uncond, cond = a["output"].to(a["guided"].dtype).chunk(2)
    share = (cond * uncond).flatten(1).sum(1) / ((uncond * uncond).flatten(1).sum(1) + a["eps"])
    fitted = _each(share, uncond) * uncond
    return {"guided": fitted + a["scale"] * (cond - fitted)}


def _projected(a: Arguments) -> dict[str, Tensor]:
    uncond, cond = a["output"].to(a["guided"].dtype).chunk(2)
    change = a["q"] * (cond - uncond)
    if a["running"] is not None:
        change = change + a["momentum"] * a["running"]
    x0 = a["p"] * a["x"] + a["q"] * cond
    lengths = change.flatten(1).norm(dim=1)
    limit = a["norm_threshold"]
    gain = a["strength"] * ((limit / lengths).clamp(max=1.0) if limit > 0 else torch.ones_like(lengths))
    along = (change * x0).flatten(1).sum(1) / (x0 * x0).flatten(1).sum(1)
    update = change - a["one_less_eta"] * _each(along, x0) * x0
    written = {"guided": cond + _each(gain, x0) * update}
    return written if a["running"] is None else written | {"running": change}


FORMULAS: Mapping[str, Formula] = {
    "_sampler_step_kernel": _sampler_step,
    "_velocity_to_epsilon_kernel": _epsilon,
    "_euler_step_kernel": _euler,
    "_shift_sigmas_kernel": _shift,
    "_zero_star_guidance_kernel": _zero_star,
    "_projected_guidance_kernel": _projected,
    "_philox_normal_kernel": _noise,
    "_training_pair_kernel": _pair,
    "_weighted_mse_kernel": _loss,
    "_weighted_mse_backward_kernel": _loss_backward,
    "_rms_norm_modulate_kernel": _modulation,
    "_rms_norm_modulate_backward_kernel": _modulation_backward,
    "_rms_norm_modulate_sums_kernel": _modulation_sums,
    "_rope_qk_kernel": _rotary,
    "softmax_rows_kernel": _softmax_rows,
    "received_kernel": _received,
    "end_kernel": _attention_end,
}
"""By kernel."""

LONG_SUMS = frozenset(
    {
        "partial",
        "along",
        "dshift",
        "dweight",
        "dscale",
        "dmodulation",
        "largest",
        "weight",
        "received",
        "sums",
    }
    | {"entropy", "locality"}
)
"""Results that are sums of many terms."""


def prepare(kernel: str, a: Arguments) -> None:
    """Make operands agree with each other where the kernel may rely on it, and fill what comes empty."""
    if kernel == "end_kernel":
        for name in ("received_parts", "sums"):
            a[name].normal_()
    if kernel == "received_kernel":
        share = 1 / a["q"].shape[1]
        exact = {"q": a["q"].double(), "k": a["k"].double(), "scale": a["scale"], "share": share}
        for name, value in _softmax_rows(exact).items():
            a[name].copy_(value)
