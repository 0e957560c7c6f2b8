"""What a model trains on: a sample corrupted to a noise level, the target at that level, and its timestep.

With ε ~ N(0, 1) and one level (α, σ) a sample, in one pass that never writes ε to memory:

    noisy = α·x0 + σ·ε        target = c·x0 + d·ε, by prediction type:

    epsilon        ε                    sample                      x0
    v_prediction   α·ε − σ·x0           flow_prediction             ε − x0
                                        reversed_flow_prediction    x0 − ε

On the flow path α = 1 − s and σ = s (Liu et al. 2022, arXiv:2209.03003), with s shifted as in `shift_sigmas`;
on the DDPM path both come from tables over integer timesteps (Ho et al. 2020, arXiv:2006.11239; v is Salimans
and Ho 2022, arXiv:2202.00512).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_sampler.kernels import _jit
from moe_sampler.kernels._dispatch import FLOATS, Operator, check_tensor
from moe_sampler.kernels.noise import check_counter, fill_normal
from moe_sampler.kernels.shift import shift_sigma

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024
_FLOAT32 = (torch.float32,)
_OF_FLOW = ("flow_prediction", "reversed_flow_prediction")
_OF_DDPM = ("epsilon", "v_prediction", "sample")


class TrainingPair(NamedTuple):
    """What a model is given (noisy, timestep) and what it should answer (target)."""

    noisy: Tensor
    target: Tensor
    timestep: Tensor


class Pair(NamedTuple):
    """The operator's arguments: those of `flow_training_pair`, or with the tables of `ddpm_training_pair`."""

    x0: Tensor
    level: Tensor  # sigma or timesteps
    alphas: Tensor | None
    sigmas: Tensor | None
    seeds: Tensor | None
    noise: Tensor | None
    step: int
    stream: int
    shift: float
    prediction: str
    timestep_scale: float
    dtype: torch.dtype


def _check(p: Pair) -> None:
    if p.x0.ndim < 1:
        raise ValueError("x0 must be [B, ...] with the batch first")
    device, batch = p.x0.device, p.x0.shape[:1]
    check_tensor("x0", p.x0, device, FLOATS)
    if p.alphas is None:
        check_tensor("sigma", p.level, device, _FLOAT32, batch)
    else:
        check_tensor("timesteps", p.level, device, (torch.int64,), batch)
        check_tensor("alphas", p.alphas, device, _FLOAT32)
        if p.alphas.ndim != 1 or p.alphas.numel() == 0:
            raise ValueError(f"alphas must have shape [T], a level a timestep, got {list(p.alphas.shape)}")
        if p.sigmas is None:
            raise ValueError("alphas without sigmas: give both tables")
        check_tensor("sigmas", p.sigmas, device, _FLOAT32, p.alphas.shape)
    if p.seeds is not None:
        if p.noise is not None:
            raise ValueError("give either seeds or noise, not both")
        check_tensor("seeds", p.seeds, device, (torch.int64,), batch)
        check_counter(p.step, p.stream)
    elif p.noise is not None:
        check_tensor("noise", p.noise, device, FLOATS, p.x0.shape)
    else:
        raise ValueError("give seeds or noise")
    predictions = _OF_FLOW if p.alphas is None else _OF_DDPM
    if p.prediction not in predictions:
        raise ValueError(f"prediction must be one of {', '.join(predictions)}, got {p.prediction!r}")
    if p.dtype not in FLOATS:
        raise TypeError(
            f"dtype must be float32, float16 or bfloat16, got {str(p.dtype).removeprefix('torch.')}"
        )


def _check_levels(p: Pair) -> None:
    if p.level.device.type != "cpu":
        return  # reading a level would wait for the device
    if p.alphas is None:
        if not ((p.level >= 0) & (p.level <= 1)).all():
            raise ValueError("sigma must lie in [0, 1], where 1 is noise")
    elif not _known(p.level, p.alphas).all():
        raise ValueError(f"timesteps must lie in [0, {p.alphas.numel()}), as the tables do")


def _known(timesteps: Tensor, table: Tensor) -> Tensor:
    return (timesteps >= 0) & (timesteps < table.numel())


def _levels(p: Pair) -> tuple[Tensor, Tensor]:
    """(α, σ), each [B]."""
    if p.alphas is None or p.sigmas is None:
        sigma = shift_sigma(p.level, p.shift)
        return 1 - sigma, sigma
    rows, unknown = p.level.clamp(0, p.alphas.numel() - 1), ~_known(p.level, p.alphas)
    alpha, sigma = (table[rows].masked_fill_(unknown, torch.nan) for table in (p.alphas, p.sigmas))
    return alpha, sigma


def _epsilon(p: Pair) -> Tensor:
    if p.seeds is not None:
        epsilon = torch.empty(p.x0.shape, dtype=torch.float32, device=p.x0.device)
        return fill_normal(epsilon, p.seeds, p.step, p.stream)
    assert p.noise is not None  # `_check` saw to it
    return p.noise.float()


def _twin(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    p = Pair(*arguments)
    _check(p)
    _check_levels(p)
    alpha, sigma = _levels(p)
    timestep = p.timestep_scale * sigma if p.alphas is None else p.level.new_empty(0)
    alpha, sigma = (level.view(-1, *(1,) * (p.x0.ndim - 1)) for level in (alpha, sigma))
    x0, epsilon = p.x0.float(), _epsilon(p)
    noisy = torch.mul(x0, alpha).addcmul_(epsilon, sigma).to(p.dtype)
    if p.prediction == "epsilon":
        return noisy, epsilon.to(p.dtype, copy=True), timestep
    if p.prediction == "sample":
        return noisy, x0.to(p.dtype, copy=True), timestep
    if p.prediction == "v_prediction":
        target = torch.mul(epsilon, alpha).addcmul_(x0, sigma, value=-1.0)
    elif p.prediction == "flow_prediction":
        target = epsilon - x0
    else:
        target = x0 - epsilon
    return noisy, target.to(p.dtype), timestep


@_jit.jit(do_not_specialize=("levels", "step", "stream"))
def _training_pair_kernel(
    noisy_ptr,
    target_ptr,
    timestep_ptr,
    x0_ptr,
    noise_ptr,
    seeds_ptr,
    level_ptr,
    alphas_ptr,
    sigmas_ptr,
    numel,
    levels,
    step,
    stream,
    shift,
    timestep_scale,
    PREDICTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """noisy = α·x0 + σ·ε and the target of the module's docstring.

    noisy, target, x0, noise: [batch, numel]. seeds: int64 [batch], in place of noise. level: the flow's
    sigma, float32 [batch], timestep: float32 [batch]; or, with alphas and sigmas: float32 [levels], int64
    [batch], and no timestep. Absent pointers are None. A program owns BLOCK consecutive elements of one
    sample, and a sample's first program its timestep.
    """
    sample, base, start, inside, mask = _jit.sample_offsets(numel, BLOCK)
    here = base + inside
    level = tl.load(level_ptr + sample)
    if alphas_ptr is not None:
        known = (level >= 0) & (level < levels)
        alpha = tl.load(alphas_ptr + level, mask=known, other=float("nan"))
        sigma = tl.load(sigmas_ptr + level, mask=known, other=float("nan"))
    else:
        sigma = _jit.shift_sigma(level, shift)
        alpha = 1.0 - sigma
        tl.store(timestep_ptr + sample, timestep_scale * sigma, mask=start == 0)
    x0 = tl.load(x0_ptr + here, mask=mask, other=0.0).to(tl.float32)
    if noise_ptr is not None:
        epsilon = tl.load(noise_ptr + here, mask=mask, other=0.0).to(tl.float32)
    else:
        epsilon = _jit.normal(tl.load(seeds_ptr + sample), step, stream, start, BLOCK)
    noisy = alpha * x0 + sigma * epsilon
    tl.store(noisy_ptr + here, noisy.to(noisy_ptr.dtype.element_ty), mask=mask)
    if PREDICTION == "epsilon":
        target = epsilon
    elif PREDICTION == "sample":
        target = x0
    elif PREDICTION == "v_prediction":
        target = alpha * epsilon - sigma * x0
    elif PREDICTION == "flow_prediction":
        target = epsilon - x0
    else:
        target = x0 - epsilon
    tl.store(target_ptr + here, target.to(target_ptr.dtype.element_ty), mask=mask)


def launch_of(p: Pair, noisy: Tensor, target: Tensor, timestep: Tensor | None) -> _jit.Launch:
    """The kernel launch for these arguments, which are not checked again; timestep only on the flow path."""
    _jit.load_triton()
    batch = p.x0.shape[0]
    numel = p.x0.numel() // max(batch, 1)
    levels = 0 if p.alphas is None else p.alphas.numel()
    pointers = (noisy, target, timestep, p.x0, p.noise, p.seeds, p.level, p.alphas, p.sigmas)
    scalars = (numel, levels, p.step, p.stream, p.shift, p.timestep_scale)
    grid = _jit.blocks(max(numel, 1), batch, _BLOCK)  # an empty sample has a timestep too
    constants = {"PREDICTION": p.prediction, "BLOCK": _BLOCK}
    return _jit.Launch(_training_pair_kernel, grid, (*pointers, *scalars), constants)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    p = Pair(*arguments)
    _check(p)
    noisy, target = torch.empty_like(p.x0, dtype=p.dtype), torch.empty_like(p.x0, dtype=p.dtype)
    return noisy, target, torch.empty_like(p.level) if p.alphas is None else p.level.new_empty(0)


def _launch(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    p = Pair(*arguments)
    noisy, target, timestep = _fake(*arguments)
    _check_levels(p)
    launch_of(p, noisy, target, timestep if p.alphas is None else None).run(p.x0.device)
    return noisy, target, timestep


_operator = Operator(
    "training_pair(Tensor x0, Tensor level, Tensor? alphas, Tensor? sigmas, Tensor? seeds, Tensor? noise, "
    "SymInt step, SymInt stream, float shift, str prediction, float timestep_scale, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)",
    twin=_twin,
    launch=_launch,
    fake=_fake,
)


def flow_training_pair(
    x0: Tensor,
    sigma: Tensor,
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    step: int = 0,
    stream: int = 0,
    shift: float = 1.0,
    prediction: str = "flow_prediction",
    timestep_scale: float = 1000.0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> TrainingPair:
    """noisy = (1 − s')·x0 + s'·ε at s' = k·s/(1 + (k − 1)·s), with its target and timestep, in one pass.

    x0: [B, ...], float32, float16 or bfloat16: data, there is no derivative. sigma: s, float32 [B] in [0, 1],
    1 = noise; another value is an error on the CPU, and goes unnoticed on CUDA, where it cannot be read
    without waiting for the device. ε is either given, noise: [B, ...], float32, float16 or bfloat16, or made
    inside the kernel from seeds: int64 [B], as philox_normal(x0.shape, seeds, step, stream=stream). shift: k
    > 0. prediction: "flow_prediction" for ε − x0 or "reversed_flow_prediction" for x0 − ε. dtype: that of
    noisy and target, x0's by default; everything is computed in float32.

    Returns noisy and target: [B, ...], and timestep = timestep_scale·s': float32 [B].
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be positive and finite, got {shift}")
    if not math.isfinite(timestep_scale):
        raise ValueError(f"timestep_scale must be finite, got {timestep_scale}")
    run, dtype = _operator.on(backend, x0.device), dtype or x0.dtype
    shift, timestep_scale = float(shift), float(timestep_scale)
    return TrainingPair(
        *run(x0, sigma, None, None, seeds, noise, step, stream, shift, prediction, timestep_scale, dtype)
    )


def ddpm_training_pair(
    x0: Tensor,
    timesteps: Tensor,
    alphas: Tensor,
    sigmas: Tensor,
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    step: int = 0,
    stream: int = 0,
    prediction: str = "v_prediction",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> TrainingPair:
    """noisy = α·x0 + σ·ε at the levels of integer timesteps, with its target, in one pass.

    x0: [B, ...], float32, float16 or bfloat16: data, there is no derivative. timesteps: int64 [B]. alphas,
    sigmas: float32 [T], √ᾱ and √(1 − ᾱ) of every timestep. A timestep outside the tables is an error on the
    CPU; on CUDA, where it cannot be read without waiting for the device, that sample's noisy becomes NaN. ε
    is either given, noise: [B, ...], float32, float16 or bfloat16, or made inside the kernel from seeds:
    int64 [B], as philox_normal(x0.shape, seeds, step, stream=stream). prediction: "epsilon" for ε,
    "v_prediction" for α·ε − σ·x0 or "sample" for x0. dtype: that of noisy and target, x0's by default;
    everything is computed in float32.

    Returns noisy and target: [B, ...], and timesteps itself.
    """
    run, dtype = _operator.on(backend, x0.device), dtype or x0.dtype
    noisy, target, _ = run(
        x0, timesteps, alphas, sigmas, seeds, noise, step, stream, 1.0, prediction, 1.0, dtype
    )
    return TrainingPair(noisy, target, timesteps)
