"""What a diffusers scheduler config says of a model, and whether all it says is done here.

Every key of the schedulers that published folders carry is in one of the tables below. A key that is in none
and isn't off, or that asks for something this package doesn't do, is an error: a sampler that differs from
what its config says in silence is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from .betas import betas_from_config
from .paths import SPACINGS, FlowPath, VPPath
from .solvers import Solver

__all__ = [
    "SOLVER_OF_SCHEDULER",
    "check_scheduler_config",
    "is_flow",
    "path_from_scheduler_config",
    "vp_path_from_config",
]

SOLVER_OF_SCHEDULER: Mapping[str, Solver] = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "FusedDDPMScheduler": "ddpm",
    "FusedDDIMScheduler": "ddim",
    "FusedFlowMatchEulerScheduler": "euler",
}
"""The schedulers an expert may be sampled as, and by which of the solvers."""

# Read by `Expert.from_scheduler_config`, here or in `betas`.
_READ = frozenset(
    {
        *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas"),
        *("rescale_betas_zero_snr", "prediction_type", "steps_offset", "clip_sample", "clip_sample_range"),
        *("set_alpha_to_one", "shift", "flow_shift", "algorithm_type", "solver_order", "solver_type"),
    }
)
HARMLESS = frozenset(
    {
        # How a solver that is replaced by one of ours steps: PNDM, UniPC, SA, LMS and the SDE ones.
        *("skip_prk_steps", "predict_x0", "solver_p", "disable_corrector", "predictor_order"),
        *("corrector_order", "tau_func", "noise_sampler_seed", "interpolation_type"),
        # Into sigma = 0, which `final_sigmas_type` makes sure of, DPM-Solver++ is first order anyway.
        *("lower_order_final", "euler_at_final"),
        # Of options that are only allowed off: thresholding, dynamic shifting, other spacings of sigmas.
        *("dynamic_thresholding_ratio", "sample_max_value", "time_shift_type", "base_shift", "max_shift"),
        *("base_image_seq_len", "max_image_seq_len", "sigma_min", "sigma_max", "rho"),
        # Of diffusers before 0.3.
        "tensor_format",
    }
)
"""Keys that change nothing here, whatever they say."""

FINE: Mapping[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_dynamic_shifting": (False,),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
    "shift_terminal": (None,),
    "lambda_min_clipped": (-math.inf,),
    "timestep_type": ("discrete",),
    "timestep_spacing": SPACINGS,
    "final_sigmas_type": ("zero",),
    "variance_type": ("fixed_small", "fixed_small_log"),
}
"""The values at which a key says what is done here; None always is one."""

# The setting of an expert that takes an option's place.
_INSTEAD = {
    "use_dynamic_shifting": "shift",
    "timestep_spacing": "spacing",
    "variance_type": "solver",
    **{f"use_{name}_sigmas": "levels" for name in ("karras", "exponential", "beta")},
    "final_sigmas_type": "solver",
}
SETTINGS_INSTEAD = frozenset(_INSTEAD.values())


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a config describes a flow rather than a path of betas."""
    return "FlowMatch" in config.get("_class_name", "") or config.get("prediction_type") == "flow_prediction"


def check_scheduler_config(config: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Refuse a config that asks for what this package doesn't do.

    Args:
        config: of a diffusers scheduler, with its `_class_name`.
        given: an expert's settings that count instead of the config's.

    Raises:
        ValueError: such a key, its value, and the values that would be fine.
    """
    scheduler = config.get("_class_name") or "the scheduler config"
    fine = dict(FINE)
    if is_flow(config):
        fine |= {"prediction_type": ("flow_prediction",), "rescale_betas_zero_snr": (False,)}
        fine["use_flow_sigmas"] = (True,)
    else:
        fine |= {"prediction_type": ("epsilon", "v_prediction", "sample"), "use_flow_sigmas": (False,)}
    for key, value in config.items():
        if key.startswith("_") or key in HARMLESS or value is None or _INSTEAD.get(key) in given:
            continue
        if key in fine:
            if value not in fine[key]:
                raise ValueError(
                    f"{scheduler}'s {key} = {value!r} is not supported: set it to {_alternatives(fine[key])}"
                    f"{f', or give {_INSTEAD[key]}' if key in _INSTEAD else ''}"
                )
        elif key not in _READ and value is not False:
            raise ValueError(
                f"{scheduler}'s {key} = {value!r} is not known here and might change the images: take it out "
                "of the config or set it to null"
            )
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        raise ValueError(
            f"{scheduler}'s rescale_betas_zero_snr leaves no signal at the last timestep, where an epsilon "
            "model says nothing about the image: set it to false, or prediction_type to v_prediction if "
            "that is what the model was trained on"
        )


def _alternatives(values: Collection[Any]) -> str:
    names = {None: "null", True: "true", False: "false"}
    return " or ".join(names.get(value, str(value)) for value in values)


def path_from_scheduler_config(config: Mapping[str, Any]) -> FlowPath | VPPath:
    """The path a diffusers scheduler config describes.

    Flow-matching schedulers give a `FlowPath`; the others a `VPPath` from their betas.

    Raises:
        ValueError: for a beta schedule this package does not know.
    """
    if is_flow(config):
        return FlowPath(timestep_scale=float(config.get("num_train_timesteps", 1000)))
    return vp_path_from_config(config)


def vp_path_from_config(config: Mapping[str, Any]) -> VPPath:
    """The path that the betas of a diffusers scheduler config describe.

    Raises:
        ValueError: for a beta schedule this package does not know.
    """
    offset = config.get("steps_offset") or 0
    if config.get("trained_betas") is None and not config.get("rescale_betas_zero_snr"):
        known = {"linear": VPPath.linear, "scaled_linear": VPPath.scaled_linear}
        shared = known.get(config.get("beta_schedule", "linear"))
        if shared is not None:  # one path for all experts of one kind
            start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
            return shared(start, end, config.get("num_train_timesteps", 1000), steps_offset=offset)
    return VPPath(tuple(betas_from_config(config)), steps_offset=offset)
