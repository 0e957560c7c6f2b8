"""What a file says of itself: trainers mark what its model predicts, in the header or by an unused tensor.

The marks are those of ModelSpec (`modelspec.*`), of sd-scripts (`ss_*`), of ComfyUI (tensors `v_pred` and
`ztsnr`) and of a scheduler's or a trainer's settings (`prediction_type`, `parameterization`, ...), which
torch files carry beside the weights. They are compared with what a config, a flag or a name says of the
model; on their own, they count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._readers import parse_json
from ..errors import CheckpointError
from .hub import SUFFIXES
from .state_dicts import header, torch_header

__all__ = ["MARK_TENSORS", "TRAINING_KEY", "read_marks", "read_training", "with_marks"]

MARK_TENSORS = ("v_pred", "ztsnr")
"""Tensors that only say something: they are no weights."""

TRAINING_KEY = "moe-sampler.training"
"""In the headers of our own files: the scheduler config as JSON, betas and all."""

_PREDICTIONS = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_pred", "v_prediction", "velocity"), "v_prediction"),
    **dict.fromkeys(("flow", "flow_matching", "flow_prediction", "rectified_flow", "rf"), "flow_prediction"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
_NAMES = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type", "parameterization")
_FLAGS = {
    **dict.fromkeys(("ss_v_parameterization", "v_parameterization"), ("prediction_type", "v_prediction")),
    **dict.fromkeys(
        ("ss_zero_terminal_snr", "zero_terminal_snr", "rescale_betas_zero_snr"),
        ("rescale_betas_zero_snr", True),
    ),
}
_BASES_OF_VELOCITY = ("sd_v2_768_v", "stable-diffusion-v2-768-v")
_EDM = "edm_"

Marks = dict[str, tuple[Any, str]]
"""A scheduler config's key: its value, and what in the file says so."""


def _said(metadata: Mapping[str, str], keys: Iterable[str]) -> Iterable[tuple[str, Any, str]]:
    keys = set(keys)
    if "v_pred" in keys:
        yield "prediction_type", "v_prediction", "its tensor v_pred"
    if "ztsnr" in keys:
        yield "rescale_betas_zero_snr", True, "its tensor ztsnr"
    for key in sorted(k for k in keys if k.startswith(_EDM)):
        yield "prediction_type", "EDM", f"its tensor {key}"
    for key in _NAMES:
        said = metadata.get(key, "").lower().replace("-", "_").replace(" ", "_")
        # A trainer's "velocity" is v to one and the flow's to another; ModelSpec defines it.
        if said not in ("", "none") and (said != "velocity" or key.startswith("modelspec.")):
            yield "prediction_type", _PREDICTIONS.get(said, metadata[key]), f"{key} = {metadata[key]}"
    for key in ("ss_base_model_version", "modelspec.architecture"):
        if metadata.get(key) in _BASES_OF_VELOCITY:
            yield "prediction_type", "v_prediction", f"{key} = {metadata[key]}"
    for key, (setting, value) in _FLAGS.items():
        said = metadata.get(key)
        if said == "True":
            yield setting, value, f"{key} = {said}"
        elif said == "False" and value is True:
            yield setting, False, f"{key} = {said}"


def read_marks(files: Iterable[Path]) -> Marks:
    """What the headers of safetensors files say, and what torch files say beside their weights.

    Raises:
        CheckpointError: they contradict themselves, or name a prediction type that isn't known here.
    """
    marks: Marks = {}
    for file in files:
        if file.suffix not in SUFFIXES:
            continue
        read = header if file.suffix == ".safetensors" else torch_header
        for key, value, why in _said(*read(file)):
            if key == "prediction_type" and value not in _PREDICTIONS.values():
                raise CheckpointError(
                    f"{file} says by {why} that its model predicts {value}, which is not supported: models "
                    f"of {', '.join(dict.fromkeys(_PREDICTIONS.values()))} are"
                )
            if marks.setdefault(key, (value, why))[0] != value:
                raise CheckpointError(
                    f"{file} contradicts itself: {marks[key][1]} says {key} = {marks[key][0]}, and {why} "
                    f"says {value}"
                )
    return marks


def read_training(files: Iterable[Path]) -> dict[str, Any] | None:
    """The scheduler config in the header of the first safetensors file, if it is one of ours.

    Raises:
        CheckpointError: it is damaged.
    """
    for file in files:
        said = header(file)[0].get(TRAINING_KEY) if file.suffix == ".safetensors" else None
        config = None if said is None else parse_json(said, f"{file}'s {TRAINING_KEY}")
        if config is not None and not isinstance(config, dict):
            raise CheckpointError(f"{file}'s {TRAINING_KEY} is no scheduler config")
        return config
    return None


def with_marks(
    training: Mapping[str, Any] | None,
    marks: Marks,
    where: str | Path,
    said_by: str,
    known: Mapping[str, Mapping[str, Any]],
) -> Mapping[str, Any] | None:
    """What a model was trained on, when both its file and something beside it say so.

    Args:
        training: a scheduler config, or None where nothing but the marks says anything.
        marks: of `read_marks`.
        where: the file, for messages.
        said_by: where `training` is from, for messages.
        known: scheduler configs by kind of expert, to begin with for marks alone.

    Raises:
        CheckpointError: they contradict each other.
    """
    if training is None:
        prediction = marks.get("prediction_type", (None, ""))[0]
        if prediction is None:
            return None
        if prediction == "flow_prediction":
            return known["lune"]
        return {**known["sd15"], **{key: value for key, (value, _) in marks.items()}}
    flow = "FlowMatch" in training.get("_class_name", "")
    default = {"prediction_type": "flow_prediction" if flow else "epsilon", "rescale_betas_zero_snr": False}
    for key, (value, why) in marks.items():
        other = default[key] if training.get(key) is None else training[key]
        if other != value:
            raise CheckpointError(
                f"{where} says by {why} that its {key} is {value}, but {said_by} says {other}: give the "
                "training it really had (ExpertSource(..., training=), --expert-training NAME=), or correct "
                "the file's mark"
            )
    return training
