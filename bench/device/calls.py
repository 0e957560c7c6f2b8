"""Kernels that a public call really launches, as the profiler saw them, beside the operators it asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.counting import count_dispatches
from bench.device.results import Row
from bench.measure import DEVICE, Call
from moe_sampler import Expert, SamplingRun, plan
from moe_sampler.kernels import (
    MinSNR,
    attention_statistics,
    ddpm_training_pair,
    euler_step_,
    flow_training_pair,
    make_row,
    philox_normal,
    rms_norm_modulate,
    rope_qk,
    sampler_step_,
    shift_sigmas,
    velocity_to_epsilon,
    weighted_mse,
)

__all__ = ["launched", "public_calls", "row"]


def row(name: str, call: Call) -> Row:
    call()  # compiles
    operators, waits = count_dispatches(call)
    kernels, copies = launched(call)
    return {
        "call": name,
        "kernels": sum(kernels.values()),
        "copies": copies,
        "operators": operators,
        "host_waits": waits,
        "names": ", ".join(f"{count} {kernel}" for kernel, count in kernels.most_common()),
    }


def launched(call: Call) -> tuple[Counter[str], int]:
    """(kernels by name, copies and fills of memory) that one call launches on the device.

    On a CPU, which launches nothing, the operators it runs stand in for kernels.
    """
    on_cpu = DEVICE == "cpu"
    activities = [ProfilerActivity.CPU] if on_cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities):
        call()  # the first profile of a process may miss what runs while it gets ready
    with profile(activities=activities) as seen:
        call()
        if not on_cpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CPU if on_cpu else DeviceType.CUDA
    names = [event.name for event in seen.events() or () if event.device_type == wanted]
    if not names:
        raise RuntimeError("the profiler saw nothing run on the device")
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return Counter(_short(n) for n in names if not n.startswith(("Memcpy", "Memset"))), copies


def _short(name: str) -> str:
    """Without a template's arguments, which fill pages."""
    return name.partition("<")[0].removeprefix("void ")[:60]


def public_calls(small: bool) -> Iterator[tuple[str, Callable[[], Call]]]:
    """(name, what makes the call) of every public operation, and of a sampler's step."""
    side, tokens, width = (8, 16, 32) if small else (64, 1024, 512)
    dtype = torch.float32 if small else torch.bfloat16

    def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)

    def seeds() -> Tensor:
        return torch.arange(4, device=DEVICE)

    def levels() -> Tensor:
        return torch.rand(4, device=DEVICE)

    def latents(grad: bool = False) -> Tensor:
        return randn(4, 4, side, side, dtype=dtype, grad=grad)

    def state() -> Tensor:
        return randn(4, 4, side, side)

    def step() -> Call:
        row = make_row(p=1.1, a=0.9, b=0.2, n=0.3, q_cond_0=-2, q_uncond_0=1.5, scale_0=0.7)
        x, output, table = state(), randn(8, 4, side, side, dtype=dtype), torch.tensor([row], device=DEVICE)
        following, drawn = torch.empty_like(output), seeds()
        return lambda: sampler_step_(x, [output], table, 0, next_inputs=[following], seeds=drawn)

    def with_arguments(
        operation: Callable, *makers: Callable[[], object], **options: object
    ) -> Callable[[], Call]:
        def make() -> Call:
            arguments = [maker() for maker in makers]
            given = {name: value() if callable(value) else value for name, value in options.items()}
            return lambda: operation(*arguments, **given)

        return make

    def backward(
        operation: Callable, *makers: Callable[[], Tensor], **options: Callable[[], object]
    ) -> Callable[[], Call]:
        def make() -> Call:
            inputs = [maker() for maker in makers]
            output = operation(*inputs, **{name: value() for name, value in options.items()})
            outputs = [output] if isinstance(output, Tensor) else list(output)
            slopes, wanted = [torch.ones_like(t) for t in outputs], [t for t in inputs if t.requires_grad]
            return lambda: torch.autograd.grad(outputs, wanted, slopes, retain_graph=True)

        return make

    def tables() -> Tensor:
        return torch.rand(1000, device=DEVICE)

    def timesteps() -> Tensor:
        return torch.tensor([0, 10, 500, 999], device=DEVICE)

    weights: dict[str, Callable[[], object]] = {
        "weight_map": lambda: torch.rand(4, 8, 8, device=DEVICE),
        "min_snr": lambda: MinSNR(5.0, levels(), levels(), "flow_prediction"),
    }

    def x() -> Tensor:
        return randn(4, tokens, width, dtype=dtype, grad=True)

    def vector(*shape: int) -> Callable[[], Tensor]:
        return lambda: randn(*shape, dtype=dtype, grad=True)

    modulation = (x, vector(width), vector(4, width), vector(4, width))

    def heads() -> Tensor:
        return randn(4, 4, tokens, width // 4, dtype=dtype, grad=True)

    def turns() -> Tensor:
        return randn(tokens, width // 8)

    rotary = (heads, heads, turns, turns, lambda: randn(4, 4, tokens, grad=True))
    map_side = round(tokens**0.5)

    def attention(q: Tensor, k: Tensor) -> object:
        with torch.no_grad():
            return attention_statistics(q, k, map_side, map_side)

    yield "sampler_step_", step
    yield "one step of a SamplingRun", lambda: _run_of_steps(side)
    yield "euler_step_", with_arguments(euler_step_, state, latents, levels, levels)
    yield "velocity_to_epsilon", with_arguments(velocity_to_epsilon, latents, state, levels, levels)
    yield "shift_sigmas", with_arguments(shift_sigmas, tables, lambda: 3.0)
    yield "philox_normal", with_arguments(philox_normal, lambda: (4, 4, side, side), seeds)
    yield "flow_training_pair", with_arguments(flow_training_pair, latents, levels, seeds=seeds, shift=3.0)
    yield (
        "ddpm_training_pair",
        with_arguments(ddpm_training_pair, latents, timesteps, tables, tables, seeds=seeds),
    )
    yield (
        "weighted_mse, forward",
        with_arguments(weighted_mse, lambda: latents(grad=True), latents, **weights),
    )
    yield "weighted_mse, backward", backward(weighted_mse, lambda: latents(grad=True), latents, **weights)
    yield "rms_norm_modulate, forward", with_arguments(rms_norm_modulate, *modulation)
    yield "rms_norm_modulate, backward", backward(rms_norm_modulate, *modulation)
    yield "rope_qk, forward", with_arguments(rope_qk, *rotary)
    yield "rope_qk, backward", backward(rope_qk, *rotary)
    yield "attention_statistics", with_arguments(attention, heads, heads)


def _run_of_steps(side: int) -> Call:
    """One guided step of a run, of a model that is one multiplication."""
    expert = Expert.sol(lambda x, timestep, factor: factor * x, guidance_scale=3.0)
    compiled = plan(expert, steps=8)
    factor = torch.ones(4, 1, 1, 1, device=DEVICE)
    run = SamplingRun(
        compiled,
        expert,
        shape=(4, 4, side, side),
        seeds=[0, 1, 2, 3],
        cond={"factor": factor},
        uncond={"factor": factor},
        device=DEVICE,
    )
    run.advance(1)  # the plan's table goes to the device

    def step() -> None:
        run.index = 3
        run.advance(4)

    return step
