"""`from_pretrained` and `save_pretrained`: a pipeline from a folder, the hub or a preset, with experts from
anywhere; and as one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import create_repo

from .._files import whole_folder
from ..loading.dtypes import Dtypes, read_dtypes
from ..loading.folders import SHARED
from ..loading.hub import Hub
from ..loading.loader_keywords import device_of_map, without_loader_keywords
from ..loading.parts import load_parts
from ..loading.presets import ExpertSource
from ..loading.presets import preset as find_preset
from .base import ExpertPipeline
from .generic import CARD, write_code_reference
from .offload import Offload, check_offload
from .settings import DEFAULTS
from .speed import Speed, check_speed, fast_dtype

__all__ = ["PretrainedMixin"]


class PretrainedMixin(ExpertPipeline):
    """Loading and saving, for a pipeline whose constructor takes components and settings by name."""

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
            offload, device: see `set_offload`.
            speed: see `set_speed`; beside "none", `dtype` is "auto" unless it is given.
            cache_dir, local_files_only, token, force_download: for the hub.
            parts: components to use instead of loading them, default settings (`handoff`,
                `num_inference_steps`, `<name>_guidance`), and keywords of diffusers' loaders, of which those
                that can't be followed are refused.

        Raises:
            CheckpointError: anything missing, unreadable, unexpected or misshapen, by name.
            ValueError: parts that don't fit each other, or a loader's keyword that can't be followed.
        """
        check_offload(offload)
        check_speed(speed)
        named = {"sol": sol, "lune": lune, "sd15": sd15}
        given = {name: source for name, source in named.items() if source is not None} | dict(experts or {})
        base = pretrained_model_name_or_path
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
        )
        settings = {**_settings_of(loaded.index, loaded.experts), **settings}
        make: Any = cls
        pipe: Self = make(**loaded.components, experts=loaded.experts, **settings)
        pipe.register_to_config(_name_or_path=str(base))
        pipe._weights.update(loaded.weights)
        if offload != "none" or device is not None:
            pipe.set_offload(offload, device)
        if speed != "none":
            pipe.set_speed(speed)
        return pipe

    @classmethod
    def from_preset(cls, name: str = "sd15", **kwargs: Any) -> Self:
        """A pipeline by name; kwargs are for `from_pretrained`."""
        return cls.from_pretrained(preset=name, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write one folder, as diffusers does, that `from_pretrained` reads back to the same bits. With its
        `pipeline.py` and moe-sampler installed, `DiffusionPipeline.from_pretrained` reads it too.

        Args:
            save_directory: created if need be.
            safe_serialization, use_flashpack: safetensors always; there is no other format here.
            variant, max_shard_size: as diffusers takes them.
            push_to_hub: upload the folder; kwargs are diffusers': `repo_id`, the folder's name by default,
                `private`, `token`, `commit_message`, `create_pr`.

        Raises:
            ValueError: an expert has LoRA adapters, which a folder of this layout doesn't hold.
            OSError: the folder can't be written; what was in it before is untouched.
        """
        unknown = kwargs.keys() - {"repo_id", "private", "token", "commit_message", "create_pr"}
        if unknown:
            raise TypeError(f"save_pretrained takes no {', '.join(sorted(unknown))}")
        if not safe_serialization or use_flashpack:
            other = "use_flashpack" if use_flashpack else "safe_serialization=False"
            raise ValueError(f"weights are written as safetensors only: leave out {other}")
        experts = {name: self.expert_unet(name) for name in self.expert_names}
        parts = {**experts, "text_encoder": self.text_encoder}
        adapted = [name for name, part in parts.items() if getattr(part, "peft_config", None)]
        if adapted:
            raise ValueError(
                f"{', '.join(adapted)} has LoRA adapters: fuse them or call unload_lora_weights() first"
            )
        options = {"variant": variant, "max_shard_size": max_shard_size}
        folder = Path(save_directory)
        settings = {name: self.config[name] for name in self._setting_names}
        with whole_folder(folder) as partial:
            if self._offload is None:
                super().save_pretrained(partial, **options)
            else:
                self._save_one_by_one(partial, {k: v for k, v in options.items() if v is not None})
            write_code_reference(partial, self.expert_names, settings, card=not (folder / CARD).exists())
        if push_to_hub:
            self._push(folder, **kwargs)

    def _push(
        self,
        folder: Path,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> None:
        repo_id = create_repo(repo_id or folder.name, exist_ok=True, private=private, token=token).repo_id
        self._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)

    def _save_one_by_one(self, folder: Path, options: Mapping[str, Any]) -> None:
        for name in self._component_names:
            part = getattr(self, name)
            expert = name.removeprefix("unet_") if name.startswith("unet_") else None
            with nullcontext() if expert is None else self._with_expert(expert):
                part.save_pretrained(folder / name, **(options if isinstance(part, torch.nn.Module) else {}))
        self.save_config(folder)


def _split(parts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components and settings out of what was passed by name."""
    modules = {k: v for k, v in parts.items() if k in SHARED or k.startswith(("unet_", "scheduler_"))}
    settings = {k: v for k, v in parts.items() if k not in modules}
    unknown = [k for k in settings if k not in DEFAULTS and not k.endswith("_guidance")]
    if unknown:
        raise TypeError(f"unknown arguments or parts of a pipeline: {', '.join(unknown)}")
    return modules, settings


def _settings_of(index: Mapping[str, Any], experts: Sequence[str]) -> dict[str, Any]:
    """The default settings a model index has for these experts."""
    keys = ("handoff", "num_inference_steps", *(f"{name}_guidance" for name in experts))
    return {key: index[key] for key in keys if key in index}
