"""Every scheduler of diffusers, compiled into a plan, beside the scheduler in a loop of its own.

python -m bench.scheduler_agreement            # writes the table of docs/SOLVERS.md, in a few minutes
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from moe_sampler.sampling.probing import Brownian
from moe_sampler.sampling.scheduler_names import REFUSED, scheduler_of

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

    def __init__(self) -> None:
        self.step = 0

    def noise(self, *args: Any, **kwargs: Any) -> Tensor:
        return philox_normal(SHAPE, SEEDS, self.step)

    @contextmanager
    def in_place_of_torchs(self) -> Iterator[None]:
        theirs = torch.randn
        torch.randn = self.noise  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            torch.randn = theirs


def by_itself(
    scheduler: Any, expert: Expert, steps: int | None, told: list[float] | None = None, **options: Any
) -> Tensor:
    """What a scheduler makes in a loop as diffusers' pipelines have it, in float32, from a plan's noise.

    told: what the model is told instead of the scheduler's timesteps.
    """
    assert expert.model is not None
    noise = Noise()
    with noise.in_place_of_torchs():
        scheduler.set_timesteps(steps, **options)
        if hasattr(scheduler, "noise_sampler"):
            scheduler.noise_sampler = Brownian(noise)
        x = philox_normal(SHAPE, SEEDS, stream=1) * getattr(scheduler, "init_noise_sigma", 1.0)
        timesteps = scheduler.timesteps if told is None else scheduler.timesteps[: len(told)]
        for noise.step, timestep in enumerate(timesteps):
            seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            time = timestep if told is None else torch.tensor(told[noise.step])
            x = scheduler.step(expert.model(seen, time), timestep, x, return_dict=False)[0]
    return x


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative: the largest, by the largest."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def agreement(expert: Expert, steps: int) -> tuple[SamplingPlan, float]:
    """A whole run of an expert's scheduler as a plan, and how far it ends from the scheduler by itself."""
    scheduler, options, told = scheduler_of(expert), {}, None
    nodes = expert.path.grid(steps, 1.0, 0.0, expert.shift, expert.spacing)
    if type(scheduler).__name__ == "LTXEulerAncestralRFScheduler":  # these two take the levels they are given
        options, told = {"sigmas": [*nodes, 0.0]}, [1000 * node for node in nodes]
    if type(scheduler).__name__ == "IPNDMScheduler":
        scheduler = type(scheduler)(trained_betas=[expert.path.at(node).sigma for node in [*nodes, 0.0]])
        told = [expert.path.timestep(expert.path.at(node)) for node in nodes]
    expected = by_itself(scheduler, expert, None if options else steps, told, **options)
    compiled = plan(expert, steps=steps)
    return compiled, difference(sample(compiled, expert, shape=SHAPE, seeds=SEEDS), expected)


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
            found = [agreement(expert_for(name, flow), steps) for steps in STEPS]
            compiled = found[0][0]
            yield {
                "scheduler": f"`{name.removesuffix('Scheduler')}`",
                "samples": "flows" if flow else "DDPM paths",
                "memories": compiled.memories,
                "calls for 8 steps": len(compiled),
                "noise": "yes" if compiled.needs_noise else "",
                **{f"{steps} steps": f"{off:.0e}" for steps, (_, off) in zip(STEPS, found, strict=True)},
            }


def block() -> str:
    table = list(rows())
    refused: list[dict[str, object]] = [
        {"scheduler": f"`{name}`", "why": why} for name, why in sorted(REFUSED.items()) if name in CLASSES
    ]
    return "\n\n".join(
        [
            f"diffusers {diffusers.__version__}, a model that isn't linear, float32; the last three columns "
            "are the largest difference at the end, relative to the largest value.",
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
