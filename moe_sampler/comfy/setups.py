"""What the nodes hand to each other: experts with their conditioning, how they share a run, and the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..sampling.experts import Expert
from ..sampling.planner import SamplingPlan, plan
from ..sampling.routers import Boundary, Crossfade, Router, Spans
from ..sampling.solvers import Solver
from .levels import ModelLevels

__all__ = ["ROUTERS", "ExpertSetup", "PlannedRun", "RouterSetup", "check_together", "planned"]

WAN_BOUNDARIES = {"Wan 2.2 text to video": 0.875, "Wan 2.2 image to video": 0.9}
"""As published: high noise above, low noise from there on."""

ROUTERS = ("handoff", "crossfade", "spans", *WAN_BOUNDARIES)


@dataclass(frozen=True)
class ExpertSetup:
    """A ComfyUI MODEL with its conditioning and its settings.

    Args:
        name: how routers, plans and errors call it.
        model: with its LoRAs and patches.
        positive, negative: CONDITIONING; negative is needed for guidance alone.
        guidance: classifier-free guidance (cfg).
        solver, eta: of this expert's steps; see `moe_sampler.Expert`.
        steps: 0 is a share of the plan's.
        shift: of a flow model's sigmas; 0 is as the model says.
        guidance_window: (high, low) noise levels between which guidance is on.
        spacing: where the steps lie, by name; None is as the model says. `moe_sampler.Expert`'s `levels`.
    """

    name: str
    model: Any
    positive: Any
    negative: Any = None
    guidance: float = 1.0
    solver: Solver = "dpmpp_2m"
    eta: float = 0.0
    steps: int = 0
    shift: float = 0.0
    guidance_window: tuple[float, float] = (1.0, 0.0)
    spacing: str | None = None

    def __post_init__(self) -> None:
        if not self.name or any(c.isspace() for c in self.name):
            raise ValueError(f"an expert's name is one word, got {self.name!r}")
        if self.guidance > 1.0 and self.negative is None:
            raise ValueError(
                f"{self.name}: guidance {self.guidance:g} needs negative conditioning; connect it"
            )

    @property
    def conds(self) -> dict[str, Any]:
        """The conditioning that there is, as ComfyUI's guiders call it."""
        both = {"positive": self.positive, "negative": self.negative}
        return {kind: cond for kind, cond in both.items() if cond is not None}

    @cached_property
    def levels(self) -> ModelLevels:
        return ModelLevels.of(self.model.get_model_object("model_sampling"))

    def expert(self, model: Any = None) -> Expert:
        """For the planner, and with its model for the loop. All predict x0: that is what ComfyUI gives."""
        return Expert(
            self.name,
            self.levels.path,
            "sample",
            model,
            solver=self.solver,
            eta=self.eta,
            levels=self.spacing,
            shift=self.shift or self.levels.shift,
            guidance_scale=self.guidance,
            guidance_window=None if self.guidance_window == (1.0, 0.0) else self.guidance_window,
        )


@dataclass(frozen=True)
class RouterSetup:
    """How the experts of a run share it.

    Args:
        kind: one of `ROUTERS`.
        at: the noise level of the handoff, or where a crossfade begins.
        until: where a crossfade ends.
        spans: "NAME END NAME END ...", from noise to data.
    """

    kind: str = "handoff"
    at: float = 0.7
    until: float = 0.5
    spans: str = ""

    def router(self, names: Sequence[str]) -> Router | None:
        """For these experts, from noise to data; None for one that works alone.

        Raises:
            ValueError: experts it doesn't fit, or spans that are none.
        """
        if self.kind == "spans":
            words = self.spans.replace(",", " ").replace(":", " ").split()
            try:
                return Spans(tuple(zip(words[::2], map(float, words[1::2]), strict=True)))
            except ValueError as error:
                raise ValueError(
                    f'spans are "NAME END NAME END ...", like "{names[0]} 0.7 {names[-1]} 0", got '
                    f'"{self.spans}": {error}'
                ) from None
        if len(names) != 2:
            raise ValueError(
                f'"{self.kind}" is between two experts, but there are {", ".join(names)}: use "spans"'
            )
        first, then = names
        if self.kind == "crossfade":
            return Crossfade(first, then, self.at, self.until)
        return Boundary(first, then, WAN_BOUNDARIES.get(self.kind, self.at))


@dataclass(frozen=True)
class PlannedRun:
    """A plan and the experts it is for."""

    plan: SamplingPlan
    experts: tuple[ExpertSetup, ...]


def check_together(experts: Sequence[ExpertSetup]) -> None:
    """Whether these can work on one latent.

    Raises:
        ValueError: two of one name, or models of different latent spaces.
    """
    names = [expert.name for expert in experts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two experts are called {name}: give each a name of its own")
    spaces = {expert.name: _latent_space(expert.model) for expert in experts}
    first, *others = spaces
    for name in others:
        if spaces[name] != spaces[first]:
            raise ValueError(
                f"{first} works on {_said(spaces[first])} and {name} on {_said(spaces[name])}: experts must "
                "share one latent space"
            )


def _latent_space(model: Any) -> tuple[str, int, float]:
    form = model.get_model_object("latent_format")
    return type(form).__name__, form.latent_channels, float(getattr(form, "scale_factor", 1.0))


def _said(space: tuple[str, int, float]) -> str:
    return f"{space[0]} latents ({space[1]} channels)"


def router_of(experts: Sequence[ExpertSetup], router: RouterSetup | None) -> Router | None:
    """Raises ValueError where several experts have none."""
    if router is None:
        if len(experts) > 1:
            raise ValueError(f"{len(experts)} experts need a MoE Router: connect one")
        return None
    return router.router([expert.name for expert in experts])


def planned(
    experts: Sequence[ExpertSetup], router: RouterSetup | None, steps: int, start: float = 1.0
) -> PlannedRun:
    """The experts' run.

    Args:
        experts: from noise to data.
        router: not needed for one expert.
        steps: in all, unless every expert has its own.
        start: the noise level it begins at: below 1 from an image.

    Raises:
        ValueError: anything that doesn't fit, before any model is called.
    """
    check_together(experts)
    own = {expert.name: expert.steps for expert in experts if expert.steps}
    if own and len(own) < len(experts):
        without = next(expert.name for expert in experts if not expert.steps)
        raise ValueError(
            f"{' and '.join(own)} has steps of its own, {without} has not: give them to all, or to none"
        )
    compiled = plan(
        [e.expert() for e in experts], router_of(experts, router), steps=own or steps, start=start
    )
    return PlannedRun(compiled, tuple(experts))
