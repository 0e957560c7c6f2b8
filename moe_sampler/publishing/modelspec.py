"""What a weights file says of itself, in its header: Stability AI's ModelSpec, and what ours adds to it.

ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec) is what ComfyUI, SwarmUI, sd-scripts and others read and
write. Beside it stands `moe-sampler.training`, the expert's scheduler config as JSON: prediction type alone
doesn't say on which betas a model was trained, so that without it a file on its own would be sampled wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._files import write_whole
from ..architectures.unet import UNET
from ..loading.marks import TRAINING_KEY

__all__ = ["HASH", "describe_expert", "describe_model", "stamp"]

HASH = "modelspec.hash_sha256"
"""Of a file's tensors."""

_PREDICTIONS = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "flow_prediction": "flow",
    "reversed_flow_prediction": "reversed_flow",
    "sample": "sample",
}
"""ModelSpec's own words are the first two; others it leaves to whoever needs them."""

_STABLE_DIFFUSION: dict[tuple[Any, ...], str] = {
    (UNET.class_name, (320, 640, 1280, 1280), 768): "stable-diffusion-v1",
    (UNET.class_name, (320, 640, 1280, 1280), 1024): "stable-diffusion-v2",
}
_BLOCK = 1 << 22


def describe_model(
    architecture: str,
    title: str,
    *,
    implementation: str = "diffusers",
    prediction: str | None = None,
    resolution: tuple[int, int] | None = None,
    license: str | None = None,
    description: str | None = None,
) -> dict[str, str]:
    """The header's keys, but for the hash, which `stamp` adds.

    Args:
        architecture: ModelSpec's identifier, one for models that are run alike.
        title: of the model, for people.
        implementation: whose tensor names these are.
        prediction: what the model predicts, as diffusers calls it.
        resolution: (width, height) in pixels that it was made for.
        license: its identifier on the hub.
        description: for people.
    """
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": implementation,
        "title": title,
        "description": description,
        "date": _today(),
        "resolution": None if resolution is None else "{}x{}".format(*resolution),
        "prediction_type": None if prediction is None else _PREDICTIONS[prediction],
        "license": license,
    }
    return {f"modelspec.{key}": value for key, value in found.items() if value is not None}


def describe_expert(
    title: str,
    config: Mapping[str, Any],
    training: Mapping[str, Any],
    prediction: str,
    *,
    scale: int | None = None,
    license: str | None = None,
) -> dict[str, str]:
    """As `describe_model`, of an expert, with what it was trained on.

    Args:
        config: the model's.
        training: its scheduler config.
        prediction: what that says the model predicts.
        scale: pixels a side of one latent pixel, where its VAE is known.
    """
    side = config.get("sample_size")
    training = {k: v for k, v in training.items() if k == "_class_name" or not k.startswith("_")}
    return describe_model(
        _architecture(config, prediction),
        title,
        prediction=prediction,
        resolution=(side * scale, side * scale) if scale is not None and isinstance(side, int) else None,
        license=license,
    ) | {TRAINING_KEY: json.dumps(training, sort_keys=True)}


def _architecture(config: Mapping[str, Any], prediction: str) -> str:
    """Models that are run otherwise have another: one of v is `...-v`, as Stable Diffusion 2's is."""
    name = str(config.get("_class_name", UNET.class_name))
    sizes = tuple(config.get("block_out_channels") or ()), config.get("cross_attention_dim")
    known = _STABLE_DIFFUSION.get((name, *sizes), name)
    return known if prediction == "epsilon" else f"{known}-{_PREDICTIONS[prediction]}"


def _today() -> str:
    """UTC; of SOURCE_DATE_EPOCH where that is set, as reproducible builds have it."""
    now = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return time.strftime("%Y-%m-%d", time.gmtime(now))


def stamp(files: Iterable[Path], described: Mapping[str, str]) -> None:
    """Add to the headers of safetensors files, which are then written anew, each whole or not at all; tensors
    stay as they are. The hash is each file's own, of its tensors' bytes, as ModelSpec defines it."""
    for file in files:
        with open(file, "rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            header = json.loads(source.read(length))
            digest = hashlib.sha256()
            while block := source.read(_BLOCK):
                digest.update(block)
            # safetensors' own writer puts them in another order each time: sorted, equal files are equal.
            metadata = {
                "format": "pt",
                **header.get("__metadata__", {}),
                **described,
                HASH: f"0x{digest.hexdigest()}",
            }
            text = json.dumps({"__metadata__": dict(sorted(metadata.items()))} | _tensors(header)).encode()
            text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight

            def write(path: Path, source: Any = source, text: bytes = text, begin: int = 8 + length) -> None:
                source.seek(begin)
                with open(path, "wb") as target:
                    target.write(struct.pack("<Q", len(text)) + text)
                    shutil.copyfileobj(source, target, _BLOCK)

            write_whole(file, write)


def _tensors(header: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in header.items() if key != "__metadata__"}
