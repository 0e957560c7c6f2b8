"""`save_pretrained` and `push_to_hub`: a pipeline as one folder with its card, here and on the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ..publishing.card import write_card
from ..publishing.modelspec import describe_expert, stamp
from ..publishing.upload import Address, Target, pushed, saved
from ..sampling.experts import Expert
from .base import ExpertPipeline, config_of
from .generic import draw_examples, pipeline_card, write_code_reference

if TYPE_CHECKING:
    from .hybrid import HybridPipeline

__all__ = ["SavingMixin"]


class SavingMixin(ExpertPipeline):
    """Saving a pipeline whose constructor takes components and settings by name."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        *,
        examples: Sequence[str] = (),
        license: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one folder, as diffusers does, that `from_pretrained` reads back to the same bits. With its
        `pipeline.py` and moe-sampler installed, `DiffusionPipeline.from_pretrained` reads it too. Its card,
        README.md, says how; the experts' weights say in their headers what they are (ModelSpec).

        Args:
            save_directory: created if need be.
            safe_serialization, use_flashpack: safetensors always; there is no other format here.
            variant, max_shard_size: as diffusers takes them.
            push_to_hub: upload the folder, too; kwargs are `Target`'s: `repo_id`, the folder's name by
                default, `private`, `token`, `commit_message`, `create_pr`, `revision`, `subfolder`.
            examples: prompts of pictures that the card shows, made now with the default settings.
            license: the model's, as the hub calls it ("mit", "openrail++"); by default what the card of the
                folder or repository names that the whole pipeline was loaded from.

        Raises:
            ValueError: an expert has LoRA adapters, which a folder of this layout doesn't hold.
            CheckpointError: the hub refuses the repository, and nothing is written; or the upload, and the
                folder is there.
            OSError: the folder can't be written; what was in it before is untouched.
        """
        self._check_savable(safe_serialization, use_flashpack)
        options = {"variant": variant, "max_shard_size": max_shard_size}
        write = partial(self._write, Path(save_directory), examples, license, options)
        saved(write, save_directory, "pipeline", push_to_hub, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        examples: Sequence[str] = (),
        license: str | None = None,
    ) -> str:
        """Upload the pipeline as `save_pretrained` writes it; returns the commit's address.

        Args:
            repo_id, commit_message, private, token, create_pr, revision, subfolder: as `Target` takes them.
            safe_serialization, variant, examples, license: as `save_pretrained` takes them.

        Raises:
            CheckpointError: the hub doesn't take it: no login, no right to, or no connection.
            ValueError: as `save_pretrained`.
        """
        self._check_savable(safe_serialization)
        target = Target(repo_id, private, token, commit_message, create_pr, revision, subfolder)
        write = partial(self._write, None, examples, license, {"variant": variant})
        return pushed(write, target, "pipeline")

    def _check_savable(self, safe_serialization: bool, use_flashpack: bool = False) -> None:
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

    def _write(
        self,
        final: Path | None,
        examples: Sequence[str],
        license: str | None,
        options: Mapping[str, Any],
        folder: Path,
        address: Address,
    ) -> None:
        """final: where the folder's files get their places."""
        settings = {name: self.config[name] for name in self._setting_names}
        license = license or self._license
        if self._offload is None:
            super().save_pretrained(folder, **options)
        else:
            self._save_one_by_one(folder, {k: v for k, v in options.items() if v is not None})
        self._describe_weights(folder, address, license)
        write_code_reference(folder, self.expert_names, settings)
        drawn = draw_examples(cast("HybridPipeline", self), folder, examples, address)
        write_card(folder, pipeline_card(self.expert_names, settings, address, drawn, license), final)

    def _describe_weights(self, folder: Path, address: Address, license: str | None) -> None:
        scale = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        for name in self.expert_names:
            unet, training = self.expert_unet(name), config_of(getattr(self, f"scheduler_{name}"))
            about = describe_expert(
                f"{Path(address.source).name}, {name}",
                {**unet.config, "_class_name": type(unet).__name__},
                training,
                Expert.from_scheduler_config(name, training).prediction,
                scale=scale,
                license=license,
            )
            stamp(sorted((folder / f"unet_{name}").glob("*.safetensors")), about)

    def _save_one_by_one(self, folder: Path, options: Mapping[str, Any]) -> None:
        for name in self._component_names:
            part = getattr(self, name)
            expert = name.removeprefix("unet_") if name.startswith("unet_") else None
            with nullcontext() if expert is None else self._with_expert(expert):
                part.save_pretrained(folder / name, **(options if isinstance(part, torch.nn.Module) else {}))
        self.save_config(folder)
