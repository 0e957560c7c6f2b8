"""What a plan was compiled from, as data: enough to compile it again, so that a changed coefficient shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .._readers import typed
from .betas import BETA_SCHEDULES, betas_from_config
from .experts import Expert
from .guiders import Guider
from .paths import FlowPath, Path, VPPath
from .routers import Boundary, Crossfade, PerStep, Spans
from .scheduler_configs import vp_path_from_config
from .scheduler_names import check_solver_name, is_borrowed, solver_data

if TYPE_CHECKING:
    from .plan import SamplingPlan

__all__ = ["ExpertRecipe", "Recipe", "compile_again"]

MOST_TIMESTEPS = 100_000
_ROUTERS = {cls.__name__: cls for cls in (Boundary, Crossfade, Spans, PerStep)}


@dataclass(frozen=True)
class ExpertRecipe:
    """An `Expert` but for its model: what the planner knows of it. `path` is as `path_data` gives it; a
    solver that is no name is a diffusers scheduler's config."""

    name: str
    path: dict[str, Any]
    prediction: str
    solver: Any
    eta: float
    shift: float
    spacing: str
    guidance_scale: float
    guidance_window: tuple[float, ...] | None
    guidance_rescale: float
    clip_sample_range: float | None
    set_alpha_to_one: bool
    reuse: Any = None
    reuse_share: float = 0.1
    levels: Any = None
    guider: Guider | None = None

    @classmethod
    def of(cls, expert: Expert) -> ExpertRecipe:
        fields = (field.name for field in dataclasses.fields(cls))
        known = {name: getattr(expert, name) for name in fields}
        return cls(**{**known, "path": path_data(expert.path), "solver": solver_data(expert.solver)})

    def expert(self) -> Expert:
        """Raises ValueError or TypeError for what makes no expert."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Expert(**{**given, "path": _path(self.path)})


@dataclass(frozen=True)
class Recipe:
    """The arguments of `plan`, as data.

    Args:
        experts: all that were given, whether they work or not.
        router: its class as "type" and its fields. A router of another class than this package's is listed
            step by step, as a `PerStep`, with the nodes as `noise_levels`.
        steps: in all or by name; None where `noise_levels` or the experts' own levels decide.
        start, end: noise levels.
        noise_levels: the nodes themselves, if they were given.
    """

    experts: tuple[ExpertRecipe, ...]
    router: dict[str, Any]
    steps: Any
    start: float
    end: float
    noise_levels: tuple[float, ...] | None

    @classmethod
    def of(
        cls,
        experts: Iterable[Expert],
        router: Any,
        steps: Any,
        span: tuple[float, float],
        levels: Sequence[float] | None,
        nodes: Sequence[tuple[float, Mapping[str, float]]],
    ) -> Recipe:
        """Of the arguments of `plan`. nodes: (noise level, weights by name) of every step."""
        kind = type(router).__name__
        if _ROUTERS.get(kind) is not type(router):
            levels, kind = [noise for noise, _ in nodes], "PerStep"
        if kind == "PerStep":
            fields: dict[str, Any] = {"steps": [dict(weights) for _, weights in nodes]}
        elif kind == "Spans":
            fields = {"spans": [list(span) for span in router.spans]}
        else:
            fields = dataclasses.asdict(router)
        return cls(
            tuple(ExpertRecipe.of(expert) for expert in experts),
            {"type": kind, **fields},
            None if levels is not None else steps,
            *span,
            None if levels is None else tuple(levels),
        )


def path_data(path: Path) -> dict[str, Any]:
    """A path's class as "type" and what it is made of; of a class that isn't this package's, its name."""
    if isinstance(path, FlowPath):
        return {"type": "FlowPath", **dataclasses.asdict(path)}
    if isinstance(path, VPPath):
        return {"type": "VPPath", **_betas_data(path.betas), "steps_offset": path.steps_offset}
    return {"type": f"{type(path).__module__}.{type(path).__qualname__}"}


@lru_cache(maxsize=16)
def _betas_data(betas: tuple[float, ...]) -> Mapping[str, Any]:
    """The keys of a diffusers config that say these betas: a schedule's name and ends, else all of them."""
    for digits in (12, None):  # the last digits are those of a square root, squared
        start, end = (value if digits is None else round(value, digits) for value in (betas[0], betas[-1]))
        for name in BETA_SCHEDULES:
            said = {"beta_schedule": name, "beta_start": start, "beta_end": end}
            said |= {"num_train_timesteps": len(betas)}
            if tuple(betas_from_config(said).tolist()) == betas:
                return said
    return {"trained_betas": list(betas)}


@dataclass(frozen=True)
class _Betas:
    steps_offset: int
    beta_schedule: str | None = None
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_train_timesteps: int = 1000
    trained_betas: tuple[float, ...] | None = None


def _path(data: Mapping[str, Any]) -> Path:
    kind, fields = data.get("type"), {key: value for key, value in data.items() if key != "type"}
    if kind == "FlowPath":
        return typed(FlowPath, fields, "path")
    if kind != "VPPath":
        raise ValueError(f"path.type must be VPPath or FlowPath, got {kind!r}")
    betas = typed(_Betas, fields, "path")
    count = betas.num_train_timesteps if betas.trained_betas is None else len(betas.trained_betas)
    if not 1 <= count <= MOST_TIMESTEPS:
        raise ValueError(f"path must have 1 to {MOST_TIMESTEPS} timesteps, got {count}")
    return vp_path_from_config(dataclasses.asdict(betas))


def _router(data: Mapping[str, Any]) -> Any:
    kind, fields = data.get("type"), {key: value for key, value in data.items() if key != "type"}
    if not isinstance(kind, str) or kind not in _ROUTERS:
        raise ValueError(f"router.type must be one of {', '.join(_ROUTERS)}, got {kind!r}")
    if kind in ("Boundary", "Crossfade"):
        return typed(_ROUTERS[kind], fields, "router")
    made, named = (Spans, "spans") if kind == "Spans" else (PerStep, "steps")
    if fields.keys() != {named} or not isinstance(fields[named], list):
        raise TypeError(f"router of type {kind} must have a list of {named}")
    return made(fields[named])


def compile_again(recipe: Recipe) -> SamplingPlan | None:
    """The plan of a recipe; None if it has a path of a class that isn't this package's, or a solver that
    diffusers brings, whose numbers are those of the version it was compiled with.

    Raises:
        ValueError, TypeError: it makes none.
    """
    from .planner import plan

    for expert in recipe.experts:
        if isinstance(expert.solver, str):
            check_solver_name(expert.solver)
        elif not isinstance(expert.solver, dict):
            raise TypeError(f"solver must be a name or a scheduler's config, got {expert.solver!r}")
    if any("." in str(e.path.get("type")) or is_borrowed(e.solver) for e in recipe.experts):
        return None
    levels = recipe.noise_levels
    return plan(
        [expert.expert() for expert in recipe.experts],
        _router(recipe.router),
        steps=recipe.steps,
        start=recipe.start,
        end=recipe.end,
        noise_levels=levels if levels is None else list(levels),
    )
