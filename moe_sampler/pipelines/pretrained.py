"""`from_pretrained` and `save_pretrained`: a pipeline from a folder, the hub or a preset, with experts from
anywhere; and as one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch

from ..loading.folders import SHARED
from ..loading.hub import Hub
from ..loading.parts import Dtypes, load_parts
from ..loading.presets import ExpertSource
from ..loading.presets import preset as find_preset
from .base import ExpertPipeline
from .offload import Offload, check_offload
from .settings import DEFAULTS

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
            dtype, torch_dtype: of all models, or by component with "default" for the others. float32.
            variant: prefer `*.<variant>.safetensors`, such as "fp16".
            revision: of the base on the hub.
            offload, device: see `set_offload`.
            cache_dir, local_files_only, token, force_download: for the hub.
            parts: components to use instead of loading them, and default settings (`handoff`,
                `num_inference_steps`, `<name>_guidance`).

        Raises:
            CheckpointError: anything missing, unreadable, unexpected or misshapen, by name.
            ValueError: parts that don't fit each other.
        """
        check_offload(offload)
        named = {"sol": sol, "lune": lune, "sd15": sd15}
        given = {name: source for name, source in named.items() if source is not None} | dict(experts or {})
        base = pretrained_model_name_or_path
        if preset is not None:
            known = find_preset(preset)
            base, given = known.base if base is None else base, {**known.experts, **given}
        if base is None:
            raise ValueError("give the folder or hub id of the base, or preset=")
        if dtype is not None and torch_dtype is not None:
            raise ValueError("dtype and torch_dtype are the same: give one of them")
        dtype = torch_dtype if dtype is None else dtype
        modules, settings = _split(parts)
        loaded = load_parts(
            base,
            given,
            dtypes=torch.float32 if dtype is None else dtype,
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
        """Write one folder, as diffusers does, that `from_pretrained` reads back to the same bits.

        Args:
            save_directory: created if need be.
            safe_serialization, use_flashpack: safetensors always; there is no other format here.
            variant, max_shard_size, push_to_hub, kwargs: as diffusers takes them.

        Raises:
            ValueError: an expert has LoRA adapters, which a folder of this layout doesn't hold.
        """
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
        if self._offload is None:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **options, **kwargs)
        elif push_to_hub:
            raise ValueError('pushing needs all experts in memory: call set_offload("none") first')
        else:
            self._save_one_by_one(Path(save_directory), {k: v for k, v in options.items() if v is not None})

    def _save_one_by_one(self, folder: Path, options: Mapping[str, Any]) -> None:
        for name, part in self.components.items():
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
