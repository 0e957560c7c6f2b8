"""What is known by name: how the published experts were trained, and where their files are. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

__all__ = ["PRESETS", "TRAINING", "ExpertSource", "Preset", "preset", "training_config"]

TRAINING: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sol": {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "clip_sample": False,
        },
        "lune": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 2.0,
        },
        "sd15": {
            "_class_name": "DPMSolverMultistepScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "epsilon",
            "timestep_spacing": "trailing",
        },
    }
)
"""By kind of expert, as diffusers' scheduler configs say it: path, betas, prediction type and shift; the
class is the default solver."""

# What a diffusers pipeline happens to sample with says how the model was trained, not how it must be sampled.
_BETA_SCHEDULERS = (
    *("PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("UniPCMultistepScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler"),
    "DPMSolverSDEScheduler",
)
_TRAINING_FACTS = (
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr", "clip_sample", "clip_sample_range"),
    *("use_flow_sigmas", "flow_shift"),
)
# diffusers' own defaults for these schedulers differ from DPMSolverMultistepScheduler's in nothing but this.
_BETAS_OF_PNDM = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


@dataclass(frozen=True)
class ExpertSource:
    """Where an expert's weights are and what it was trained on.

    Args:
        weights: a diffusers folder or hub id (of a UNet, or of a pipeline, whose UNet is then taken), a hub
            file `repo:file`, or a file: `.safetensors` with diffusers' or the original keys, or a trainer's
            `.pt`.
        training: a kind of expert ("sol", "lune", "sd15"), or a diffusers scheduler config with
            `_class_name`. Without it, the scheduler config beside the weights counts, else the expert's own
            name, if it is such a kind.
        revision: of the hub repository.
        subfolder: of the folder or hub repository.
    """

    weights: str | Path
    training: str | Mapping[str, Any] | None = None
    revision: str | None = None
    subfolder: str | None = None

    @classmethod
    def of(cls, source: ExpertSource | str | Path) -> ExpertSource:
        """A bare path or hub id is a source without further settings."""
        return source if isinstance(source, ExpertSource) else cls(source)


@dataclass(frozen=True)
class Preset:
    """A whole pipeline by name: the base its experts share, and the experts from noise to data."""

    base: str
    experts: Mapping[str, ExpertSource]


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "sd15": Preset(
            base="stable-diffusion-v1-5/stable-diffusion-v1-5",
            experts={
                "sol": ExpertSource("AbstractPhil/tinyflux-experts:sd15-flow-sol-unet.safetensors", "sol"),
                "lune": ExpertSource("AbstractPhil/tinyflux-experts:sd15-flow-lune-unet.safetensors", "lune"),
            },
        )
    }
)
"""Pipelines by name: "sd15" is Sol and Lune as published, on Stable Diffusion 1.5."""


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f'unknown preset "{name}": use {", ".join(PRESETS)}')
    return PRESETS[name]


def training_config(training: str | Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler config that `Expert.from_scheduler_config` understands.

    A scheduler class that is only a way to sample (PNDM, Euler ...) becomes `DPMSolverMultistepScheduler` on
    the betas and prediction type it names; how it spaces timesteps is not taken over.

    Raises:
        ValueError: an unknown kind of expert, or a config that asks for more than that.
    """
    if isinstance(training, str):
        if training not in TRAINING:
            raise ValueError(
                f'unknown kind of expert "{training}": use {", ".join(TRAINING)}, or give a scheduler config'
            )
        return dict(TRAINING[training])
    from ..sampling import scheduler_configs

    config = dict(training)
    scheduler = config.get("_class_name")
    if scheduler in scheduler_configs.SOLVER_OF_SCHEDULER:
        # What a setting of the expert may still replace is checked when it is planned.
        scheduler_configs.check_scheduler_config(config, scheduler_configs.SETTINGS_INSTEAD)
    if scheduler not in _BETA_SCHEDULERS:
        return config
    scheduler_configs.check_scheduler_config(config)
    facts = {key: config[key] for key in _TRAINING_FACTS if config.get(key) is not None}
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        **_BETAS_OF_PNDM,
        **facts,
        "timestep_spacing": "trailing",
    }
