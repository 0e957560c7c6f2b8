"""Every scheduler of diffusers, compiled into a plan, beside the scheduler in a loop of its own.

python -m bench.scheduler_agreement            # writes the table of docs/SOLVERS.md, in a few minutes
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.schedulers
import torch
from torch import Tensor

from bench.pages import renew_page
from bench.report import markdown
from moe_sampler import Expert, SamplingPlan, plan, sample
from moe_sampler.kernels import philox_normal
from moe_sampler.sampling.predictions import x0_coefficients
from moe_sampler.sampling.probing import Brownian, InDouble
from moe_sampler.sampling.scheduler_names import REFUSED, scheduler_of
from moe_sampler.sampling.scheduler_trails import as_double

SOLVERS = Path(__file__).parents[1] / "docs" / "SOLVERS.md"
SHAPE, SEEDS = (2, 1, 4, 8), [3, 4]
STEPS = (8, 20, 50)
CLASSES = sorted(
    name for name in dir(diffusers.schedulers) if name.endswith("Scheduler") and not name.startswith("Flax")
)
"""All that the installed diffusers has."""
FLOWS = ("FlowMatch", "LTX")
BOTH = (
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("SASolverScheduler", "UniPCMultistepScheduler"),
)
"""Those that sample DDPM paths and flows."""


def nonlinear(expert: Expert) -> Expert:
    """The expert with a model whose prediction of the data bends with what it sees."""

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        p, q = x0_coefficients(expert.prediction, expert.path.level(float(timestep)))
        seen = x.double()
        x0 = 0.5 * torch.tanh(1.5 * seen) + 0.1 * torch.sin(4.0 * seen)
        return ((x0 - p * seen) / q).to(x.dtype)

    return replace(expert, model=model)


def expert_for(name: str, flow: bool = False) -> Expert:
    """An expert that a scheduler class samples. PNDM takes averages of what the model says, which must be
    noise for that."""
    kind = Expert.lune if flow or name.startswith(FLOWS) else Expert.sol
    return nonlinear((Expert.sd15 if name == "PNDMScheduler" else kind)(solver=name))


class Noise:
    """What a plan draws at its k-th call, for a scheduler or a function that asks for noise in that call."""

    shape: tuple[int, ...] = SHAPE

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.step, self._dtype = 0, dtype

    def noise(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.drawn(self.step)

    def drawn(self, step: int = 0, stream: int = 0) -> Tensor:
        with torch._C.DisableTorchFunction():  # its kernel is float32's
            return philox_normal(SHAPE, SEEDS, step, stream=stream).to(self._dtype)

    @contextmanager
    def in_place_of_torchs(self) -> Iterator[None]:
        theirs = torch.randn
        torch.randn = self.noise  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            torch.randn = theirs


def by_itself(
    scheduler: Any,
    expert: Expert,
    steps: int | None,
    told: list[float] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    """What a scheduler makes in a loop as diffusers' pipelines have it, from a plan's noise.

    told: what the model is told instead of the timesteps of a scheduler that takes the levels it is given.
    dtype: of what is sampled, and in float64 of all that is computed from the scheduler's levels.
    """
    assert expert.model is not None
    noise = Noise(dtype)
    exact = InDouble() if dtype == torch.float64 else nullcontext()
    with noise.in_place_of_torchs(), exact if told is not None else nullcontext():
        scheduler.set_timesteps(steps, **options)
    with noise.in_place_of_torchs(), exact:
        scheduler = scheduler if dtype == torch.float32 else as_double(scheduler)
        if hasattr(scheduler, "noise_sampler"):
            scheduler.noise_sampler = Brownian(noise)
        x = noise.drawn(stream=1) * getattr(scheduler, "init_noise_sigma", 1.0)
        timesteps = scheduler.timesteps if told is None else scheduler.timesteps[: len(told)]
        for noise.step, timestep in enumerate(timesteps):
            seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            time = timestep if told is None else torch.tensor(told[noise.step])
            x = scheduler.step(expert.model(seen, time), timestep, x, return_dict=False)[0]
    return x


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative: the largest, by the largest."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def agreement(expert: Expert, steps: int, dtype: torch.dtype = torch.float32) -> tuple[SamplingPlan, float]:
    """A whole run of an expert's scheduler as a plan, and how far it ends, in float32, from the scheduler by
    itself, which computes in `dtype` throughout."""
    compiled = plan(expert, steps=steps)
    expected = _whole_run(expert, steps, dtype)
    return compiled, difference(sample(compiled, expert, shape=SHAPE, seeds=SEEDS), expected.float())


def _whole_run(expert: Expert, steps: int, dtype: torch.dtype) -> Tensor:
    scheduler, options, told = scheduler_of(expert), {}, None
    nodes = expert.path.grid(steps, 1.0, 0.0, expert.shift, expert.spacing)
    if type(scheduler).__name__ == "LTXEulerAncestralRFScheduler":  # these two take the levels they are given
        options, told = {"sigmas": [*nodes, 0.0]}, [1000 * node for node in nodes]
    if type(scheduler).__name__ == "IPNDMScheduler":
        scheduler = type(scheduler)(trained_betas=[expert.path.at(node).sigma for node in [*nodes, 0.0]])
        told = [expert.path.timestep(expert.path.at(node)) for node in nodes]
    return by_itself(scheduler, expert, None if options else steps, told, dtype, **options)


def function_by_itself(
    function: Callable[..., Tensor], sigmas: list[float], expert: Expert, scale: float
) -> Tensor:
    """What a sampling function in k-diffusion's form makes, in float32, from a plan's noise."""
    assert expert.model is not None
    model, flow, noise = expert.model, not expert.path.discrete, Noise()
    noise.step = -1

    def denoise(x: Tensor, sigma: Any) -> Tensor:
        noise.step += 1
        sigma = float(torch.as_tensor(sigma).flatten()[0])
        level = expert.path.at(sigma if flow else sigma / (1 + sigma))
        seen = (x.double() if flow else x.double() * level.alpha).float()
        p, q = x0_coefficients(expert.prediction, level)
        output = model(seen, torch.tensor(expert.path.timestep(level), dtype=torch.float64))
        return (p * seen.double() + q * output.double()).float()

    takes = inspect.signature(function).parameters
    options: dict[str, Any] = {"noise_sampler": Brownian(noise)} if "noise_sampler" in takes else {}
    options |= {"disable": True} if "disable" in takes else {}
    return function(denoise, philox_normal(SHAPE, SEEDS, stream=1) * scale, torch.tensor(sigmas), **options)


def rows() -> Iterator[dict[str, object]]:
    for name in CLASSES:
        if name in REFUSED:
            continue
        for flow in (False, True) if name in BOTH else (name.startswith(FLOWS),):
            expert = expert_for(name, flow)
            found = [agreement(expert, steps) for steps in STEPS]
            exact = max(agreement(expert, steps, torch.float64)[1] for steps in STEPS)
            compiled = found[0][0]
            yield {
                "scheduler": f"`{name.removesuffix('Scheduler')}`",
                "samples": "flows" if flow else "DDPM paths",
                "memories": compiled.memories,
                "calls for 8 steps": len(compiled),
                "noise": "yes" if compiled.needs_noise else "",
                **{f"{steps} steps": f"{off:.0e}" for steps, (_, off) in zip(STEPS, found, strict=True)},
                "its float64": f"{exact:.0e}",
            }


def block() -> str:
    table = list(rows())
    refused: list[dict[str, object]] = [
        {"scheduler": f"`{name}`", "why": why} for name, why in sorted(REFUSED.items()) if name in CLASSES
    ]
    return "\n\n".join(
        [
            f"diffusers {diffusers.__version__}, on a model that isn't linear, float32; the last four "
            "columns are the largest difference at the end, relative to the largest value: from the "
            "scheduler as it is, and the largest of the three from one that computes in float64.",
            markdown(table, table[0]),
            "Refused by name:",
            markdown(refused, refused[0]),
        ]
    )


def main() -> None:
    text = block()
    renew_page(SOLVERS, "schedulers", text)
    print(text)


if __name__ == "__main__":
    main()
