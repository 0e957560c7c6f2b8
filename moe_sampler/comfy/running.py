"""A plan run with ComfyUI's models: stage by stage, so that an expert is loaded when its part begins."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import torch

from ..sampling.initial import INITIAL_NOISE_STREAM, noised
from ..sampling.loop import SamplingRun
from ..sampling.plan import SamplingPlan
from .opened import OpenExpert, Work, load, opened
from .setups import PlannedRun

__all__ = ["noise_of_seeds", "run", "state_device"]

Callback = Callable[[int, torch.Tensor, torch.Tensor, int], None]


def noise_of_seeds(shape: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    """[B, ...] float32 N(0, 1): what the rest of this package starts from with these seeds, one a sample."""
    from moe_sampler.kernels import philox_normal

    return philox_normal(tuple(shape), seeds, stream=INITIAL_NOISE_STREAM)


def state_device(device: torch.device) -> torch.device:
    """Where the state is kept while a model works on `device`: there, if the fused step runs there, else on
    the CPU. A step then moves one latent each way, which is nothing next to a model's call."""
    fused = device.type == "cpu" or (device.type == "cuda" and find_spec("triton") is not None)
    return device if fused else torch.device("cpu")


def _stages(plan: SamplingPlan) -> Iterator[tuple[tuple[str, ...], int]]:
    """(Who is at work, the step up to which) of the plan's stretches, in order."""
    names = [tuple(sorted(call.name for call in step.calls)) for step in plan.steps]
    until = 0
    for own, steps in itertools.groupby(names):
        until += len(list(steps))
        yield own, until


class _Models:
    """The experts' models as the loop calls them; told by the loop whether a call is guided by its batch."""

    def __init__(self, run: PlannedRun, batch: int) -> None:
        self.open = {setup.name: OpenExpert(setup) for setup in run.experts}
        self._batch = batch
        self.enter(())

    def enter(self, names: Sequence[str]) -> list[OpenExpert]:
        """Those that are to be opened for a stage. The last one opened is the one sure to be loaded."""
        self._shared, self._loaded = len(names) > 1, names[-1] if names else ""
        return [self.open[name] for name in names]

    def experts(self) -> list:
        return [own.setup.expert(self._model(own)) for own in self.open.values()]

    def _model(self, expert: OpenExpert) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        setup, levels = expert.setup, expert.setup.levels

        def model(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            guided = sample.shape[0] > self._batch
            x = sample[: self._batch].to(setup.model.load_device)
            if self._shared and self._loaded != setup.name:
                load(expert.guider, x.shape)
            self._loaded = setup.name
            sigma = levels.sigma(timestep).to(x.device)
            x0 = expert.x0(levels.scaled(x, sigma), sigma, setup.guidance if guided else 1.0).to(
                sample.device
            )
            # ComfyUI guides; the row then takes g x0 + (1 - g) x0.
            return torch.cat([x0, x0]) if guided else x0

        return model


def _sigmas(run: PlannedRun) -> dict[str, torch.Tensor]:
    """The plan's levels as each model calls them."""
    steps = run.plan.steps
    noises = [*(step.level.noise for step in steps), steps[-1].target.noise]
    return {own.name: own.levels.sigmas_at(noises) for own in run.experts}


def run(planned: PlannedRun, work: Work, seeds: Sequence[int], callback: Callback) -> torch.Tensor:
    """[B, ...] float32: the latents, in the models' scale, that a plan makes.

    Args:
        planned: the plan and its experts.
        work: latent, noise, mask and seed.
        seeds: of the steps' own noise, one a sample.
        callback: ComfyUI's, called with (step, x0, x, steps).

    Raises:
        NonFiniteError: NaN or an infinity came of a step.
    """
    plan = planned.plan
    models, sigmas = _Models(planned, work.latent.shape[0]), _sigmas(planned)
    running: list[SamplingRun] = []

    def begin(latent: torch.Tensor, noise: torch.Tensor) -> SamplingRun:
        device = state_device(noise.device)
        noise, latent = noise.to(device, torch.float32), latent.to(device, torch.float32)
        x = noised(plan, latent, noise=noise) if plan.from_image else noise * plan.initial_scale
        return SamplingRun(
            plan,
            models.experts(),
            x,
            seeds=seeds,
            cond={},
            uncond={},
            callback=lambda step: callback(step["step"], step["x0"], step["x"], len(plan)),
        )

    for names, until in _stages(plan):

        def advance(latent: torch.Tensor, noise: torch.Tensor, until: int = until) -> None:
            if not running:
                running.append(begin(latent, noise))
            running[0].advance(until)

        opened(models.enter(names), sigmas, work, advance)
    running[0].check()
    return running[0].x
