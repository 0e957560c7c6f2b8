"""Conversions between parametrizations, as operators of their own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_sampler.kernels import _jit
from moe_sampler.kernels._dispatch import FLOATS, Operator, check_no_overlap, check_tensor
from moe_sampler.kernels.shift import shift_sigma

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024
_FLOAT32 = (torch.float32,)


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *(1,) * (like.ndim - 1))


def _check_pair(x: Tensor, velocity: Tensor, x_dtypes: tuple[torch.dtype, ...], **levels: Tensor) -> None:
    check_tensor("x", x, x.device, x_dtypes)
    check_tensor("velocity", velocity, x.device, FLOATS, x.shape)
    for name, level in levels.items():
        check_tensor(name, level, x.device, _FLOAT32, x.shape[:1])


def _check_finite(**levels: float) -> None:
    for name, level in levels.items():
        if not math.isfinite(level):
            raise ValueError(f"{name} must be finite, got {level}")


def _extent(x: Tensor, per_sample: bool) -> tuple[int, tuple[int]]:
    """Elements and grid of each sample, or of the whole tensor where samples need not be told apart."""
    samples = x.shape[0] if per_sample else 1
    numel = x.numel() // max(samples, 1)
    return numel, _jit.blocks(numel, samples, _BLOCK)


# velocity_to_epsilon


def _epsilon_weights(alpha, sigma):
    norm = alpha * alpha + sigma * sigma
    return sigma / norm, alpha / norm


def _epsilon_twin(velocity: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    _check_pair(x, velocity, FLOATS, alpha=alpha, sigma=sigma)
    from_x, from_velocity = _epsilon_weights(_per_sample(alpha, x), _per_sample(sigma, x))
    return torch.mul(x.float(), from_x).addcmul_(velocity, from_velocity).to(velocity.dtype)


def _epsilon_level_twin(velocity: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
    _check_pair(x, velocity, FLOATS)
    from_x, from_velocity = _epsilon_weights(alpha, sigma)
    return torch.mul(x.float(), from_x).add_(velocity, alpha=from_velocity).to(velocity.dtype)


@_jit.jit
def _velocity_to_epsilon_kernel(
    epsilon_ptr, velocity_ptr, x_ptr, alpha_ptr, sigma_ptr, from_x, from_velocity, numel, BLOCK: tl.constexpr
):
    """ε = (σ·x + α·v)/(α² + σ²) = from_x·x + from_velocity·v.

    epsilon, velocity, x: [batch, numel]. alpha, sigma: float32 [batch], or None where the two weights hold
    for all samples. A program owns BLOCK consecutive elements of one sample.
    """
    sample, base, _, inside, mask = _jit.sample_offsets(numel, BLOCK)
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr + sample)
        sigma = tl.load(sigma_ptr + sample)
        norm = alpha * alpha + sigma * sigma
        from_x = tl.div_rn(sigma, norm)
        from_velocity = tl.div_rn(alpha, norm)
    x = tl.load(x_ptr + (base + inside), mask=mask, other=0.0).to(tl.float32)
    velocity = tl.load(velocity_ptr + (base + inside), mask=mask, other=0.0).to(tl.float32)
    epsilon = from_x * x + from_velocity * velocity
    tl.store(epsilon_ptr + (base + inside), epsilon.to(epsilon_ptr.dtype.element_ty), mask=mask)


def epsilon_launch_of(
    epsilon: Tensor,
    velocity: Tensor,
    x: Tensor,
    alpha: Tensor | None = None,
    sigma: Tensor | None = None,
    weights: tuple[float, float] = (0.0, 0.0),
) -> _jit.Launch:
    """The kernel launch for levels per sample (alpha, sigma) or for one pair of weights."""
    _jit.load_triton()
    numel, grid = _extent(x, per_sample=alpha is not None)
    args = (epsilon, velocity, x, alpha, sigma, *weights, numel)
    return _jit.Launch(_velocity_to_epsilon_kernel, grid, args, {"BLOCK": _BLOCK})


def _epsilon_launch(velocity: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    _check_pair(x, velocity, FLOATS, alpha=alpha, sigma=sigma)
    epsilon = torch.empty_like(velocity)
    epsilon_launch_of(epsilon, velocity, x, alpha, sigma).run(x.device)
    return epsilon


def _epsilon_level_launch(velocity: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
    _check_pair(x, velocity, FLOATS)
    epsilon = torch.empty_like(velocity)
    epsilon_launch_of(epsilon, velocity, x, weights=_epsilon_weights(alpha, sigma)).run(x.device)
    return epsilon


_epsilon = Operator(
    "velocity_to_epsilon(Tensor velocity, Tensor x, Tensor alpha, Tensor sigma) -> Tensor",
    twin=_epsilon_twin,
    launch=_epsilon_launch,
    fake=lambda velocity, x, alpha, sigma: torch.empty_like(velocity),
)
_epsilon_level = Operator(
    "velocity_to_epsilon.level(Tensor velocity, Tensor x, float alpha, float sigma) -> Tensor",
    twin=_epsilon_level_twin,
    launch=_epsilon_level_launch,
    fake=lambda velocity, x, alpha, sigma: torch.empty_like(velocity),
)


def velocity_to_epsilon(
    velocity: Tensor, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, *, backend: str | None = None
) -> Tensor:
    """ε = (σ·x + α·v)/(α² + σ²), the noise that v = α·ε − σ·x0 implies at x = α·x0 + σ·ε.

    velocity, x: [B, ...], float32, float16 or bfloat16 each. alpha, sigma: numbers, or float32 [B] tensors.
    Computed in float32; returns [B, ...] in the velocity's dtype.
    """
    if not (isinstance(alpha, Tensor) or isinstance(sigma, Tensor)):
        _check_finite(alpha=alpha, sigma=sigma)
        if alpha == 0 and sigma == 0:
            raise ValueError("alpha and sigma must not both be zero")
        return _epsilon_level.on(backend, x.device)(velocity, x, alpha, sigma)
    return _epsilon.on(backend, x.device)(velocity, x, _level(alpha, x), _level(sigma, x))


def _level(value: float | Tensor, x: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full(x.shape[:1], value, device=x.device)


# euler_step_


def _check_euler(x: Tensor, velocity: Tensor, **levels: Tensor) -> None:
    _check_pair(x, velocity, _FLOAT32, **levels)
    check_no_overlap(written=(("x", x),), read=(("velocity", velocity), *levels.items()))


def _euler_twin(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> None:
    _check_euler(x, velocity, sigma=sigma, sigma_next=sigma_next)
    x.addcmul_(velocity, _per_sample(sigma - sigma_next, x), value=-1.0)


def _euler_level_twin(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> None:
    _check_euler(x, velocity)
    x.add_(velocity, alpha=sigma_next - sigma)


@_jit.jit
def _euler_step_kernel(x_ptr, velocity_ptr, sigma_ptr, sigma_next_ptr, step_down, numel, BLOCK: tl.constexpr):
    """x ← x − u·(s − s').

    x: float32 [batch, numel]. velocity: [batch, numel]. sigma, sigma_next: float32 [batch], or None where
    step_down = s − s' holds for all samples. A program owns BLOCK consecutive elements of one sample.
    """
    sample, base, _, inside, mask = _jit.sample_offsets(numel, BLOCK)
    if sigma_ptr is not None:
        step_down = tl.load(sigma_ptr + sample) - tl.load(sigma_next_ptr + sample)
    x = tl.load(x_ptr + (base + inside), mask=mask, other=0.0)
    velocity = tl.load(velocity_ptr + (base + inside), mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + (base + inside), x - step_down * velocity, mask=mask)


def euler_launch_of(
    x: Tensor,
    velocity: Tensor,
    sigma: Tensor | None = None,
    sigma_next: Tensor | None = None,
    step_down: float = 0.0,
) -> _jit.Launch:
    """The kernel launch for levels per sample (sigma, sigma_next) or for one step_down = σ − σ'."""
    _jit.load_triton()
    numel, grid = _extent(x, per_sample=sigma is not None)
    args = (x, velocity, sigma, sigma_next, step_down, numel)
    return _jit.Launch(_euler_step_kernel, grid, args, {"BLOCK": _BLOCK})


def _euler_launch(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> None:
    _check_euler(x, velocity, sigma=sigma, sigma_next=sigma_next)
    euler_launch_of(x, velocity, sigma, sigma_next).run(x.device)


def _euler_level_launch(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> None:
    _check_euler(x, velocity)
    euler_launch_of(x, velocity, step_down=sigma - sigma_next).run(x.device)


_euler = Operator(
    "euler_step_(Tensor(a!) x, Tensor velocity, Tensor sigma, Tensor sigma_next) -> ()",
    twin=_euler_twin,
    launch=_euler_launch,
    fake=lambda x, velocity, sigma, sigma_next: None,
)
_euler_level = Operator(
    "euler_step_.level(Tensor(a!) x, Tensor velocity, float sigma, float sigma_next) -> ()",
    twin=_euler_level_twin,
    launch=_euler_level_launch,
    fake=lambda x, velocity, sigma, sigma_next: None,
)


def euler_step_(
    x: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """x ← x − u·(s − s'), one Euler step of the flow from level s down to s', in place.

    x: float32 [B, ...], the state. velocity: u = ε − x0, [B, ...], float32, float16 or bfloat16.
    sigma, sigma_next: numbers, or float32 [B] tensors. Returns x.
    """
    if isinstance(sigma, Tensor) or isinstance(sigma_next, Tensor):
        _euler.on(backend, x.device)(x, velocity, _level(sigma, x), _level(sigma_next, x))
    else:
        _check_finite(sigma=sigma, sigma_next=sigma_next)
        _euler_level.on(backend, x.device)(x, velocity, sigma, sigma_next)
    return x


# shift_sigmas


def _check_sigmas(sigmas: Tensor) -> None:
    check_tensor("sigmas", sigmas, sigmas.device, (torch.float32, torch.float64))


def _shift_twin(sigmas: Tensor, shift: float) -> Tensor:
    _check_sigmas(sigmas)
    return shift_sigma(sigmas, shift)


@_jit.jit
def _shift_sigmas_kernel(out_ptr, sigmas_ptr, shift, numel, BLOCK: tl.constexpr):
    """s' = k·s / (1 + (k − 1)·s). out, sigmas: float32 [numel]. A program owns BLOCK consecutive levels."""
    _, _, _, inside, mask = _jit.sample_offsets(numel, BLOCK)
    sigma = tl.load(sigmas_ptr + inside, mask=mask, other=0.0)
    tl.store(out_ptr + inside, _jit.shift_sigma(sigma, shift), mask=mask)


def shift_launch_of(out: Tensor, sigmas: Tensor, shift: float) -> _jit.Launch:
    """The kernel launch for float32 levels."""
    _jit.load_triton()
    numel, grid = _extent(sigmas, per_sample=False)
    return _jit.Launch(_shift_sigmas_kernel, grid, (out, sigmas, shift, numel), {"BLOCK": _BLOCK})


def _shift_launch(sigmas: Tensor, shift: float) -> Tensor:
    if sigmas.dtype == torch.float64:
        return _shift_twin(sigmas, shift)
    _check_sigmas(sigmas)
    out = torch.empty_like(sigmas)
    shift_launch_of(out, sigmas, shift).run(sigmas.device)
    return out


_shift = Operator(
    "shift_sigmas(Tensor sigmas, float shift) -> Tensor",
    twin=_shift_twin,
    launch=_shift_launch,
    fake=lambda sigmas, shift: torch.empty_like(sigmas),
)


def shift_sigmas(sigmas: Tensor, shift: float, *, backend: str | None = None) -> Tensor:
    """s' = k·s/(1 + (k − 1)·s) for every level of a flow's schedule.

    sigmas: float32 of any shape, or float64 (in plain torch on every device), 1 = noise. shift: k > 0.
    Returns a new tensor like `sigmas`.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be positive and finite, got {shift}")
    return _shift.on(backend, sigmas.device)(sigmas, shift)
