"""From any file of Sol, Lune or another expert of Stable Diffusion 1.5's shape to a ComfyUI MODEL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_sampling
import comfy.sd
import comfy.utils
import numpy as np
import torch

from ..errors import CheckpointError
from ..loading.expert_files import find_expert
from ..loading.hub import Hub
from ..loading.marks import MARK_TENSORS
from ..loading.presets import ExpertSource
from ..loading.state_dicts import check_fit, read_tensors, refuse, without_wrappers
from ..sampling.experts import Expert
from ..sampling.paths import FlowPath, VPPath

__all__ = ["load_expert", "with_training"]

_SMALLEST_SIGNAL = 4.8973451890853435e-08
"""abar where nothing of the data is left: ComfyUI's, whose sigmas must be finite."""


def load_expert(name: str, source: ExpertSource | str | Path) -> Any:
    """A MODEL that is sampled as the expert was trained.

    Args:
        name: "sol" or "lune" say what an unmarked file was trained on.
        source: a file, folder, hub id or hub file, as everywhere in this package.

    Raises:
        CheckpointError: not there, unreadable, not of this shape, or marked as something else.
    """
    files = find_expert(name, source, Path(), Hub(), None)
    where = str(files.where)
    tensors = without_wrappers(read_tensors(files.weights), files.architecture.prefixes, where)
    original = _original_names({k: v for k, v in tensors.items() if k not in MARK_TENSORS}, where)
    model = comfy.sd.load_diffusion_model_state_dict(dict(original))
    if model is None:
        raise CheckpointError(f"{where}: ComfyUI knows no model of this shape; Sol and Lune have SD 1.5's")
    check_fit(original, model.model.diffusion_model.state_dict(), where, "UNet")
    return with_training(model, files.training)


def with_training(model: Any, training: Mapping[str, Any]) -> Any:
    """The MODEL with the noise path and prediction type that a diffusers scheduler config describes."""
    expert = Expert.from_scheduler_config("expert", training)
    kinds = {
        "epsilon": comfy.model_sampling.EPS,
        "v_prediction": comfy.model_sampling.V_PREDICTION,
        "flow_prediction": comfy.model_sampling.CONST,
        "sample": comfy.model_sampling.X0,
    }
    path, kind = expert.path, kinds[expert.prediction]
    if isinstance(path, VPPath):
        sampling = _sampling(comfy.model_sampling.ModelSamplingDiscrete, kind, model)
        signal = np.maximum(path.alphas**2, _SMALLEST_SIGNAL)
        sampling.set_sigmas(torch.from_numpy(np.sqrt((1.0 - signal) / signal)))
    else:
        assert isinstance(path, FlowPath)  # a scheduler config makes one of the two
        sampling = _sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, kind, model)
        sampling.set_parameters(shift=expert.shift, multiplier=path.timestep_scale)
    patched = model.clone()
    patched.add_object_patch("model_sampling", sampling)
    return patched


def _sampling(schedule: type, kind: type, model: Any) -> Any:
    """As ComfyUI puts them together."""
    return type("ModelSampling", (schedule, kind), {})(model.model.model_config)


def _original_names(tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """A UNet's tensors by Stable Diffusion's original names, from those or from diffusers'."""
    if any(key.startswith("input_blocks.") for key in tensors):
        return dict(tensors)
    prefix = "model.diffusion_model."
    whole = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if whole:  # a checkpoint, whose other parts are other nodes' business
        return whole
    names = comfy.utils.unet_to_diffusers(_blocks(tensors))
    refuse(where, "UNet", {"unexpected": sorted(key for key in tensors if key not in names)})
    return {names[key]: value for key, value in tensors.items()}


def _blocks(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """How many blocks of which kind a diffusers UNet has, as ComfyUI's map of names wants to know it."""
    parts = [key.split(".") for key in tensors]

    def count(*head: str) -> int:
        """Of the numbered modules after these."""
        return len({part[len(head)] for part in parts if part[: len(head)] == [*head]})

    def depths(side: str, block: int) -> list[int]:
        place = side, str(block)
        resnets = count(*place, "resnets")
        return [count(*place, "attentions", str(i), "transformer_blocks") for i in range(resnets)]

    levels = count("down_blocks")
    down = [depths("down_blocks", i) for i in range(levels)]
    up = [depths("up_blocks", i) for i in range(levels)]
    return {
        "channel_mult": [1] * levels,
        "num_res_blocks": [len(own) for own in down],
        "transformer_depth": [depth for own in down for depth in own],
        "transformer_depth_middle": count("mid_block", "attentions", "0", "transformer_blocks"),
        "transformer_depth_output": [depth for own in up for depth in own][::-1],
    }
