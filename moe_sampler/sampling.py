"""The loop: call the model, launch one fused kernel, repeat. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .experts import Expert
from .kernels import philox_normal, sampler_step_
from .kernels.noise import seeds_tensor
from .planning import ExpertCall, SamplingPlan

__all__ = ["initial_latents", "sample"]

INITIAL_NOISE_STREAM = 1  # the steps' own noise is stream 0
Callback = Callable[[dict[str, Any]], torch.Tensor | None]


def initial_latents(
    plan: SamplingPlan,
    shape: Sequence[int],
    seeds: Sequence[int] | torch.Tensor,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The state a plan starts from: float32 noise that depends on each sample's seed alone.

    Args:
        plan: decides the scale.
        shape: of the batch, [B, ...].
        seeds: B integers, one a sample.
    """
    if len(seeds) != shape[0]:
        raise ValueError(f"{shape[0]} samples need as many seeds, got {len(seeds)}")
    noise = philox_normal(tuple(shape), seeds, stream=INITIAL_NOISE_STREAM, device=device)
    return noise.mul_(plan.initial_scale)


def _conditioning(
    plan: SamplingPlan,
    batch: int,
    cond: Mapping[str, torch.Tensor] | None,
    uncond: Mapping[str, torch.Tensor] | None,
) -> dict[bool, dict[str, torch.Tensor]]:
    """Keyword arguments for unguided (False) and guided (True) calls."""
    given = {"cond": dict(cond or {}), "uncond": dict(uncond or {})}
    for kind, values in given.items():
        for key, value in values.items():
            if value.shape[0] != batch:
                raise ValueError(f"{kind}[{key!r}] has batch {value.shape[0]}, the latents have {batch}")
    if not plan.guided:
        return {False: given["cond"]}
    if uncond is None:
        raise ValueError("the plan uses classifier-free guidance: give `uncond` beside `cond`")
    if set(given["uncond"]) != set(given["cond"]):
        raise ValueError(
            f"cond and uncond must have the same keys, got {sorted(given['cond'])} "
            f"and {sorted(given['uncond'])}"
        )
    both = {key: torch.cat([given["uncond"][key], value]) for key, value in given["cond"].items()}
    return {False: given["cond"], True: both}


class _Inputs:
    """Two alternating sets of model inputs, so that a model may return its input itself."""

    def __init__(self, x: torch.Tensor, experts: Mapping[str, Expert]) -> None:
        self._x, self._experts = x, experts
        self._buffers: dict[tuple[int, int, int, torch.dtype], torch.Tensor] = {}

    def buffers(self, calls: Iterable[ExpertCall], index: int) -> list[torch.Tensor]:
        return [self._buffer(index % 2, slot, call) for slot, call in enumerate(calls)]

    def _buffer(self, parity: int, slot: int, call: ExpertCall) -> torch.Tensor:
        batch = self._x.shape[0] * (2 if call.guided else 1)
        key = (parity, slot, batch, self._experts[call.name].dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(
                (batch, *self._x.shape[1:]), dtype=key[-1], device=self._x.device
            )
        return self._buffers[key]

    def write(self, calls: Sequence[ExpertCall], index: int) -> list[torch.Tensor]:
        """Fill a step's inputs from the state: before the first step, or after a callback changed it."""
        buffers = self.buffers(calls, index)
        for call, buffer in zip(calls, buffers, strict=True):
            for copy in buffer.split(self._x.shape[0]):
                copy.copy_(self._x * call.input_scale)
        return buffers


def _timesteps(plan: SamplingPlan, device: torch.device) -> list[list[torch.Tensor]]:
    """0-d device tensors, int64 for discrete paths and float32 else, moved in two copies."""
    calls = [call for step in plan.steps for call in step.calls]
    whole = iter(torch.tensor([int(c.timestep) for c in calls], dtype=torch.int64).to(device).unbind())
    real = iter(torch.tensor([float(c.timestep) for c in calls], dtype=torch.float32).to(device).unbind())
    pairs = iter([(i, r) for i, r in zip(whole, real, strict=True)])

    def pick(call: ExpertCall) -> torch.Tensor:
        integer, floating = next(pairs)
        return integer if isinstance(call.timestep, int) else floating

    return [[pick(call) for call in step.calls] for step in plan.steps]


def _output(result: Any) -> torch.Tensor:
    return (result if isinstance(result, torch.Tensor) else result[0]).contiguous()


@torch.no_grad()
def sample(
    plan: SamplingPlan,
    experts: Expert | Iterable[Expert],
    x: torch.Tensor | None = None,
    *,
    shape: Sequence[int] | None = None,
    seeds: Sequence[int] | torch.Tensor | None = None,
    noise: Callable[[int], torch.Tensor] | None = None,
    cond: Mapping[str, torch.Tensor] | None = None,
    uncond: Mapping[str, torch.Tensor] | None = None,
    device: torch.device | str = "cpu",
    callback: Callback | None = None,
) -> torch.Tensor:
    """Run a plan.

    Args:
        plan: from `moe_sampler.plan`.
        experts: with their models; every expert the plan names must be among them.
        x: [B, ...] float32, the state to start from (it is not modified); or give `shape` and `seeds`.
        shape: [B, ...] of the state to draw.
        seeds: one integer a sample. Noise is a function of (seed, step, element) alone, so a sample is the
            same alone and inside any batch.
        noise: instead of `seeds` for the steps' noise: `noise(step)` returns [B, ...] float32.
        cond, uncond: keyword arguments for the models, tensors with the batch first. Guided calls get
            `cat([uncond, cond])`, diffusers' order, unguided calls `cond` alone.
        device: where to run when `x` isn't given.
        callback: gets a dict after each step: `step`, `plan_step`, `x` (the state), `x0` (the prediction;
            both are live buffers, clone what you keep). A returned tensor replaces the state.

    Returns:
        [B, ...] float32, the plan's last target.

    Raises:
        ValueError: missing experts, models, seeds or conditioning, before any model call.
    """
    known = {e.name: e for e in ([experts] if isinstance(experts, Expert) else experts)}
    for name in plan.experts:
        if name not in known or known[name].model is None:
            raise ValueError(f"the plan calls expert {name!r}: pass it to sample() with its model")
    if x is None:
        if shape is None or seeds is None:
            raise ValueError("give either x, or shape and seeds")
        x = initial_latents(plan, shape, seeds, device)
    else:
        if x.dtype != torch.float32:
            raise TypeError(f"the sampling state is float32 whatever the models' dtype, got {x.dtype}")
        x = x.clone(memory_format=torch.contiguous_format)
    if plan.needs_noise and seeds is None and noise is None:
        raise ValueError("the plan adds fresh noise: give seeds (one a sample) or a noise function")
    if seeds is not None and len(seeds) != x.shape[0]:
        raise ValueError(f"{x.shape[0]} samples need as many seeds, got {len(seeds)}")
    conditioning = _conditioning(plan, x.shape[0], cond, uncond)

    table, timesteps = plan.table(x.device), _timesteps(plan, x.device)
    seed_tensor = seeds_tensor(seeds, x.device) if plan.needs_noise and noise is None else None
    # The prediction is kept only where someone reads it: a multistep solver, or the caller.
    history = any(step.coefficients["d"] != 0.0 for step in plan.steps)
    x0 = torch.zeros_like(x) if history or callback is not None else None
    inputs = _Inputs(x, known)
    current = inputs.write(plan.steps[0].calls, 0)

    for index, step in enumerate(plan.steps):
        outputs = [
            _output(known[call.name].model(model_input, timestep, **conditioning[call.guided]))
            for call, model_input, timestep in zip(step.calls, current, timesteps[index], strict=True)
        ]
        last = index + 1 == len(plan)
        following = [] if last else inputs.buffers(plan.steps[index + 1].calls, index + 1)
        fresh = noise(index) if noise is not None and step.coefficients["n"] != 0.0 else None
        # Noise exists only where the row asks for it, so a deterministic step never touches the generator.
        drawn = seed_tensor if step.coefficients["n"] != 0.0 else None
        sampler_step_(x, outputs, table, index, x0_prev=x0, next_inputs=following, seeds=drawn, noise=fresh)
        if callback is not None:
            replaced = callback({"step": index, "plan_step": step, "x": x, "x0": x0})
            if replaced is not None:
                x.copy_(replaced)
                if not last:
                    following = inputs.write(plan.steps[index + 1].calls, index + 1)
        current = following
    return x
