"""diffusers' schedulers as solvers: which there are, by what names people know them, how one is made for an
expert, and why some are none."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .solvers import SOLVERS
from .spacing_names import Levels

if TYPE_CHECKING:
    from .experts import Expert

__all__ = [
    "GIVEN_LEVELS",
    "KNOWN_NAMES",
    "REFUSED",
    "check_scheduler",
    "check_solver_name",
    "is_borrowed",
    "is_known_name",
    "levels_of",
    "scheduler_of",
    "solver_data",
    "solver_label",
]

GIVEN_LEVELS = ("IPNDMScheduler", "LTXEulerAncestralRFScheduler")
"""Schedulers that take the levels they are given: they get the expert's own."""
_SPACINGS = ("karras", "exponential", "beta")
"""A name may end in one of these: a spacing of ours where we give the levels (see `levels_of`), else the
scheduler's `use_..._sigmas`."""

_VP: Mapping[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp_3m_sde": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
    ),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "deis": ("DEISMultistepScheduler", {}),
    "deis_3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "sa_solver": ("SASolverScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    # By its formulas a step is a whole number of timesteps, which other spacings only come near to.
    "pndm": ("PNDMScheduler", {"timestep_spacing": "leading"}),
    "ipndm": ("IPNDMScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
_FLOW: Mapping[str, tuple[str, dict[str, Any]]] = {
    **{name: _VP[name] for name in ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_sde", "dpmpp_2s")},
    **{name: _VP[name] for name in ("unipc", "unipc_3", "deis", "deis_3", "sa_solver")},
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "euler_a": ("LTXEulerAncestralRFScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "lcm": ("FlowMatchLCMScheduler", {}),
}
_SINCE: Mapping[str, str] = {"LTXEulerAncestralRFScheduler": "0.37"}
"""The diffusers that brought a scheduler, for those that the oldest supported one lacks."""
KNOWN_NAMES: tuple[str, ...] = tuple(name for name in {**_VP, **_FLOW} if name not in SOLVERS)
"""What people call a sampler, beside the solvers built in; each may end in _karras, _exponential or _beta."""

_TOKENS = "it samples tokens, not latents"
_OWN = "its step needs more than the model's output and the state"
_INVERSE = "it runs from data to noise"
_EDM = "it wraps the model in EDM's preconditioning, which no prediction type here stands for"
REFUSED: Mapping[str, str] = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "DDIMInverseScheduler": _INVERSE,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "CogVideoXDPMScheduler": _OWN,
    "FlowMapEulerDiscreteScheduler": _OWN,
    "HeliosDMDScheduler": _OWN,
    "HeliosScheduler": _OWN,
    "MiniMaxH3Scheduler": _OWN,
    "PiflowScheduler": _OWN,
    "RePaintScheduler": _OWN,
    "RFD4ProteinaScheduler": _OWN,
    "ConsistencyDecoderScheduler": "it belongs to one decoder, on a path of its own",
    "CMStochasticIterativeScheduler": "it belongs to consistency models, whose outputs are scaled by level",
    "CosineDPMSolverMultistepScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": _EDM,
    "EDMEulerScheduler": _EDM,
    "DDPMWuerstchenScheduler": "its timesteps are its own path's, in continuous time",
    "KarrasVeScheduler": "it adds noise before the model's call and corrects after a second one",
    "SCMScheduler": "it belongs to sCM's TrigFlow, in angles",
    "ScoreSdeVeScheduler": "its corrector divides by norms of what it samples",
    "ScoreSdeVpScheduler": "its model predicts a score",
    "UnCLIPScheduler": "it needs the next timestep with every step, and unCLIP's own path",
}
"""diffusers' schedulers that no expert can be sampled by, and why."""


def _split(name: str) -> tuple[str, str | None]:
    base, _, last = name.rpartition("_")
    return (base, last) if last in _SPACINGS and base else (name, None)


def check_solver_name(solver: str) -> None:
    """Raise ValueError unless it is a solver's name, one that people know a sampler by, or looks like a
    scheduler's class, which is looked up when a plan is made."""
    if solver in REFUSED:
        raise ValueError(f"{solver} cannot be a solver: {REFUSED[solver]}")
    base, _ = _split(solver)
    if solver in SOLVERS or base in _VP or base in _FLOW or _is_class(solver):
        return
    raise ValueError(
        f'unknown solver "{solver}": use one of {", ".join(SOLVERS)}, one that diffusers brings '
        f"({', '.join(KNOWN_NAMES)}; with _karras, _exponential or _beta), or a scheduler's class"
    )


def is_known_name(solver: Any) -> bool:
    """Whether a solver is what people call a sampler, so that what it does is ours to say, rather than a
    scheduler, which does what it does."""
    return isinstance(solver, str) and not _is_class(solver)


def check_scheduler(scheduler: Any) -> None:
    """Raise TypeError or ValueError unless it is a scheduler that may be a solver."""
    name = type(scheduler).__name__
    if name in REFUSED:
        raise ValueError(f"{name} cannot be a solver: {REFUSED[name]}")
    if not all(hasattr(scheduler, each) for each in ("set_timesteps", "step", "config")):
        raise TypeError(f"a solver is a name or one of diffusers' schedulers, got {scheduler!r}")
    for key, instead in (("thresholding", "False"), ("clip_sample", "False, and give clip_sample_range")):
        if dict(scheduler.config).get(key):
            raise ValueError(
                f"{name}'s {key} = True is not affine, so that no plan can hold it: set it to {instead}"
            )


def _is_class(name: str) -> bool:
    return name.isidentifier() and name.endswith("Scheduler")


def is_borrowed(solver: Any) -> bool:
    """Whether a solver is a scheduler of diffusers, by itself or by name, rather than one built in."""
    return not (isinstance(solver, str) and solver in SOLVERS)


def solver_label(solver: Any) -> str:
    """What a plan calls it."""
    return solver if isinstance(solver, str) else type(solver).__name__


def solver_data(solver: Any) -> Any:
    """A solver as data: its name, or a scheduler's class and config."""
    if isinstance(solver, str):
        return solver
    plain = (str, int, float, bool, type(None))
    config = {
        key: list(value) if isinstance(value, list | tuple) else value
        for key, value in dict(solver.config).items()
        if not key.startswith("_") and isinstance(value, (*plain, list, tuple))
    }
    return {"_class_name": type(solver).__name__, **config}


def scheduler_of(expert: Expert) -> Any:
    """The scheduler that an expert's solver names, made for its path and prediction, or the one it is.

    Raises:
        ValueError: diffusers has none of that name, or it doesn't sample such experts.
    """
    from .paths import FlowPath  # brings torch, which the names alone don't need

    if not isinstance(expert.solver, str):
        return expert.solver
    flow = isinstance(expert.path, FlowPath)
    known, (base, spacing) = (_FLOW if flow else _VP), _split(expert.solver)
    if _is_class(expert.solver):
        name, settings = expert.solver, {}
    elif base in known:
        name, settings = known[base][0], dict(known[base][1])
        if spacing is not None and not _takes_levels(expert, name):
            settings[f"use_{spacing}_sigmas"] = True
    else:
        raise ValueError(
            f"{expert.name}: {base} does not sample {'flows' if flow else 'DDPM paths'}: use one of "
            f"{', '.join(_here(known))}"
        )
    cls = _class(expert, name, known)
    return _made(expert, cls, _config(expert, cls, settings))


def _takes_levels(expert: Expert, scheduler: str) -> bool:
    """Whether the levels of a run are ours to give: to the classes that have none of their own, and to what
    samples a flow by a name. With `use_karras_sigmas` and its like most of diffusers' schedulers forget
    `use_flow_sigmas`, and go through levels of a DDPM path."""
    from .paths import FlowPath

    return scheduler in GIVEN_LEVELS or (is_known_name(expert.solver) and isinstance(expert.path, FlowPath))


def levels_of(expert: Expert, scheduler: str) -> Levels:
    """The levels that an expert gives its scheduler: those it was given itself, or that the solver's name
    says; None where it says none.

    Raises:
        ValueError: it was given levels, and they are the scheduler's to say, or the name says others.
    """
    spacing = _split(expert.solver)[1] if is_known_name(expert.solver) else None
    if expert.levels is None:
        return spacing if _takes_levels(expert, scheduler) else None
    if spacing is not None:
        raise ValueError(
            f"{expert.name}: {expert.solver} says where the steps lie, so that no levels can be given: leave "
            "one of them out"
        )
    if not _takes_levels(expert, scheduler):
        raise ValueError(
            f"{expert.name}: {solver_label(expert.solver)} brings its own noise levels, so that none can be "
            f"given: use one of {', '.join(SOLVERS)}, or a name that says them, like unipc_karras"
        )
    return expert.levels


def _here(known: Mapping[str, tuple[str, dict[str, Any]]]) -> list[str]:
    """The names of solvers, built in and of the diffusers that is installed."""
    import diffusers.schedulers

    brought = (name for name, (cls, _) in known.items() if hasattr(diffusers.schedulers, cls))
    return list(dict.fromkeys([*SOLVERS, *brought]))


def _class(expert: Expert, name: str, known: Mapping[str, tuple[str, dict[str, Any]]]) -> Any:
    import diffusers.schedulers

    found = getattr(diffusers.schedulers, name, None)
    if found is None:
        called = "" if expert.solver == name else f" ({expert.solver})"
        came = f", which came with {_SINCE[name]}: install that or a newer one, or" if name in _SINCE else ":"
        raise ValueError(
            f"{expert.name}: diffusers {diffusers.__version__} has no {name}{called}{came} "
            f"use one of {', '.join(_here(known))}"
        )
    lacks = [package for package in getattr(found, "_backends", ()) if find_spec(package) is None]
    if lacks:  # diffusers' stand-in for a class that needs more
        raise ValueError(f"{expert.name}: diffusers' {name} needs {lacks[0]}: pip install {lacks[0]}")
    return found


def _config(expert: Expert, cls: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What a scheduler's config must say to sample an expert."""
    from .paths import FlowPath, VPPath

    takes = inspect.signature(cls.__init__).parameters
    if isinstance(expert.path, FlowPath):
        if expert.prediction != "flow_prediction":
            raise ValueError(
                f"{expert.name}: diffusers' schedulers sample flow_prediction, not {expert.prediction}: use "
                f"one of {', '.join(SOLVERS)}"
            )
        if "use_flow_sigmas" in takes:
            settings |= {"use_flow_sigmas": True, "prediction_type": expert.prediction}
            settings |= {"flow_shift": expert.shift}
        elif "FlowMatch" in cls.__name__:
            settings |= {"shift": expert.shift}
        elif cls.__name__ != "LTXEulerAncestralRFScheduler":
            raise ValueError(f"{expert.name}: {cls.__name__} does not sample flows")
    elif isinstance(expert.path, VPPath):
        if cls.__name__ == "IPNDMScheduler" and expert.prediction != "v_prediction":
            raise ValueError(f"{expert.name}: {cls.__name__} samples v_prediction, not {expert.prediction}")
        if "trained_betas" not in takes:
            raise ValueError(f"{expert.name}: {cls.__name__} does not sample DDPM paths")
        settings = {
            "trained_betas": list(expert.path.betas),
            "prediction_type": expert.prediction,
            "num_train_timesteps": len(expert.path.betas),
            "timestep_spacing": expert.spacing,
            "steps_offset": expert.path.steps_offset,
            "set_alpha_to_one": expert.set_alpha_to_one,
            "clip_sample": False,
            "skip_prk_steps": True,  # PNDM's Runge-Kutta start remembers one thing more
            "snr_shift_scale": 1.0,  # with which CogVideoX's DDIM would bend the path
        } | settings
    else:
        raise ValueError(
            f"{expert.name}: give the scheduler itself, not its name, on a path of your own: what it is to "
            "be configured with is not known"
        )
    return {key: value for key, value in settings.items() if key in takes or key.startswith("use_")}


def _made(expert: Expert, cls: Any, config: dict[str, Any]) -> Any:
    takes = inspect.signature(cls.__init__).parameters
    for key in config:
        if key not in takes:
            raise ValueError(
                f"{expert.name}: {cls.__name__} has no {key}: leave the ending of {expert.solver} out"
            )
    return cls(**config)
