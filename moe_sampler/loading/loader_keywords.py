"""Keywords that diffusers' loaders take, and what becomes of them here: taken as true already, or refused by
name with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["device_of_map", "without_loader_keywords"]

_NO_CODE = "nothing in a folder is executed"
_MEMORY = 'offload="expert" or "model" limits memory'

_TRUE_ALREADY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "safety_checker": ((None,), "there is none here"),
    "requires_safety_checker": ((None, False), "there is no safety checker here"),
    "feature_extractor": ((None,), "it belongs to the safety checker, which there is none of here"),
    "image_encoder": ((None,), "IP adapters are not supported"),
    "use_safetensors": (
        (None, True),
        "weights are read as safetensors, and experts from a trainer's .pt, too",
    ),
    "low_cpu_mem_usage": ((None, True, False), ""),  # experts are always mapped
    "trust_remote_code": ((None, True, False), ""),  # allowed or not, nothing is executed
    "add_prefix_space": ((None, False), "the tokenizer's files decide"),
    "custom_pipeline": ((None,), f"{_NO_CODE}: from diffusers, DiffusionPipeline.from_pretrained takes it"),
    "custom_revision": ((None,), _NO_CODE),
    "use_onnx": ((None, False), "there are no ONNX pipelines here"),
    "use_flashpack": ((None, False), "weights are read as safetensors"),
    "disable_mmap": ((None, False), "files are mapped"),
    "load_connected_pipeline": ((None, False), "there is no connected pipeline"),
    "output_loading_info": ((None, False), "loading is strict: what isn't right is an error"),
    "offload_state_dict": ((None, False), _MEMORY),
    "resume_download": ((None, True, False), ""),  # the hub's client always resumes
    "device_map": ((None,), f'give device="cuda"; {_MEMORY}'),
    "max_memory": ((None,), _MEMORY),
    "offload_folder": ((None,), f"{_MEMORY}; on a CPU experts stay in their own files"),
    "quantization_config": ((None,), "quantize a model yourself and pass it as unet_<name>="),
    "proxies": ((None,), "the environment's HTTPS_PROXY counts"),
    "mirror": ((None,), "the environment's HF_ENDPOINT counts"),
    "use_auth_token": ((None,), "it is called token"),
    "scheduler": ((), "every expert has its own: give scheduler_<name>=, or solver= to a call"),
    "unet": ((), "every expert has its own: give unet_<name>="),
}
"""By keyword: the values that say what is so anyway, and what to say of others."""


def without_loader_keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, without the keywords of diffusers' loaders that say what is so anyway.

    Raises:
        ValueError: one of these keywords with a value that can't be followed.
    """
    for name, value in given.items():
        if name in _TRUE_ALREADY:
            fine, instead = _TRUE_ALREADY[name]
            if not any(value is one or (isinstance(one, str) and value == one) for one in fine):
                # A model's repr goes on for pages.
                plain = isinstance(value, str | int | float | dict | list | type(None))
                shown = repr(value) if plain and len(repr(value)) < 100 else type(value).__name__
                raise ValueError(f"{name}={shown} is not supported: {instead}")
    return {name: value for name, value in given.items() if name not in _TRUE_ALREADY}


def device_of_map(device_map: Any, device: Any) -> tuple[Any, Any]:
    """(What is left of a device map, the device): a map that is one device for everything is that device."""
    if device is None and isinstance(device_map, str) and device_map.split(":")[0] in ("cpu", "cuda", "mps"):
        return None, device_map
    return device_map, device
