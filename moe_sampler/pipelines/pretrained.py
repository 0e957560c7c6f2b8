"""`from_pretrained`: a pipeline from a folder, the hub or a preset, with experts from anywhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from ..loading.dtypes import Dtypes, read_dtypes
from ..loading.folders import SHARED
from ..loading.hub import Hub
from ..loading.loader_keywords import device_of_map, without_loader_keywords
from ..loading.parts import load_parts
from ..loading.presets import ExpertSource
from ..loading.presets import preset as find_preset
from ..publishing.card import license_in
from ..publishing.upload import Address
from .offload import Offload, check_offload
from .saving import SavingMixin
from .settings import default_keys, is_default
from .speed import Speed, check_speed, fast_dtype

__all__ = ["PretrainedMixin"]


class PretrainedMixin(SavingMixin):
    """Loading, for a pipeline whose constructor takes components and settings by name."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        *,
        preset: str | None = None,
        sol: ExpertSource | str | Path | None = None,
        lune: ExpertSource | str | Path | None = None,
        sd15: ExpertSource | str | Path | None = None,
        experts: Mapping[str, ExpertSource | str | Path] | None = None,
        dtype: Dtypes | None = None,
        torch_dtype: Dtypes | None = None,
        variant: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        offload: Offload = "none",
        speed: Speed = "none",
        device: torch.device | str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
        **parts: Any,
    ) -> Self:
        """Load the parts experts share from one place, and the experts from there or from anywhere.

        Args:
            pretrained_model_name_or_path: the base, a local folder or a hub id: of a pipeline like this one
                (`unet_sol/`, `scheduler_sol/` ...), or of Stable Diffusion, whose VAE, text encoder and
                tokenizer are then used.
            preset: "sd15" for Stable Diffusion 1.5 with the published Sol and Lune; what else is given takes
                precedence.
            sol, lune, sd15: an expert of that name, trained as that name says unless a scheduler config lies
                beside it: a diffusers folder, a hub id `owner/name`, a hub file `owner/name:file`, or a file
                (see `ExpertSource`, which also takes a revision and other training settings).
            experts: experts by any name, in the order they work in; they follow those above.
            dtype, torch_dtype: of all models, or by component with "default" for the others; torch's, or by
                name; "auto" is what `device` computes fastest in (see `speed.fast_dtype`). float32.
            variant: prefer `*.<variant>.safetensors`, such as "fp16".
            revision: of the base on the hub.
            subfolder: of the base's folder or hub repository.
            offload, device: see `set_offload`.
            speed: see `set_speed`; beside "none", `dtype` is "auto" unless it is given, and so is a call's
                `reuse`.
            cache_dir, local_files_only, token, force_download: for the hub.
            parts: components to use instead of loading them, default settings (`handoff`,
                `num_inference_steps`, `<name>_guidance`, `<name>_solver`, `<name>_levels`), and keywords of
                diffusers' loaders, of which those that can't be followed are refused.

        Raises:
            CheckpointError: anything missing, unreadable, unexpected or misshapen, by name.
            ValueError: parts that don't fit each other, or a loader's keyword that can't be followed.
        """
        check_offload(offload)
        check_speed(speed)
        named = {"sol": sol, "lune": lune, "sd15": sd15}
        given = {name: source for name, source in named.items() if source is not None} | dict(experts or {})
        base, own = pretrained_model_name_or_path, len(given)
        if preset is not None:
            known = find_preset(preset)
            base, given = known.base if base is None else base, {**known.experts, **given}
        if base is None:
            raise ValueError("give the folder or hub id of the base, or preset=")
        device_map, device = device_of_map(parts.pop("device_map", None), device)
        if dtype is None and torch_dtype is None and speed != "none":
            dtype = "auto"
        dtypes = read_dtypes(dtype, torch_dtype, auto=lambda: fast_dtype(device))
        modules, settings = _split(without_loader_keywords({**parts, "device_map": device_map}))
        loaded = load_parts(
            base,
            given,
            dtypes=torch.float32 if dtypes is None else dtypes,
            hub=Hub(cache_dir, local_files_only, token, force_download),
            revision=revision,
            variant=variant,
            passed=modules,
            resident=offload != "expert",
            subfolder=subfolder,
        )
        settings = {**_settings_of(loaded.index, loaded.experts), **settings}
        make: Any = cls
        pipe: Self = make(**loaded.components, experts=loaded.experts, **settings)
        pipe.register_to_config(_name_or_path=str(base))
        pipe._weights.update(loaded.weights)
        if not given and not modules:  # what is from elsewhere has a licence of its own
            pipe._license = license_in(loaded.folder)
            pipe._loaded_by = f"from_pretrained({Address(str(base), revision, subfolder).arguments})"
        elif preset is not None and own == 0 and pretrained_model_name_or_path is None and not modules:
            pipe._loaded_by = f'from_preset("{preset}")'
        if offload != "none" or device is not None:
            pipe.set_offload(offload, device)
        if speed != "none":
            pipe.set_speed(speed)
        return pipe

    @classmethod
    def from_preset(cls, name: str = "sd15", **kwargs: Any) -> Self:
        """A pipeline by name; kwargs are for `from_pretrained`."""
        return cls.from_pretrained(preset=name, **kwargs)


def _split(parts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components and settings out of what was passed by name."""
    modules = {k: v for k, v in parts.items() if k in SHARED or k.startswith(("unet_", "scheduler_"))}
    settings = {k: v for k, v in parts.items() if k not in modules}
    unknown = [k for k in settings if not is_default(k)]
    if unknown:
        raise TypeError(f"unknown arguments or parts of a pipeline: {', '.join(unknown)}")
    return modules, settings


def _settings_of(index: Mapping[str, Any], experts: Sequence[str]) -> dict[str, Any]:
    """The default settings a model index has for these experts."""
    return {key: index[key] for key in default_keys(experts) if key in index}
