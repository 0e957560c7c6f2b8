"""LoRA adapters, each for one expert, through diffusers' PEFT loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import is_peft_available, recurse_remove_peft_layers

from ..architectures import architecture_of
from ..architectures.unet import UNET
from ..errors import listed
from ..loading.lora_files import read_lora
from .base import ExpertPipeline

__all__ = ["AdapterMixin"]


def _check_peft() -> None:
    if not is_peft_available():
        raise ValueError("LoRA adapters need the package peft: pip install peft")


def _adapters(model: torch.nn.Module) -> set[str]:
    return set(getattr(model, "peft_config", {}))


def _remove_all(model: Any) -> None:
    """Take every adapter out of a model of diffusers or transformers."""
    if not _adapters(model):
        return
    if hasattr(model, "unload_lora"):
        model.unload_lora()
        return
    recurse_remove_peft_layers(model)
    del model.peft_config
    model._hf_peft_config_loaded = False


def _forget(model: Any, names: set[str]) -> None:
    """Take out adapters that were loaded in part, and put the layers back if there are no others."""
    if _adapters(model) <= names:
        _remove_all(model)
    elif hasattr(model, "delete_adapters"):
        model.delete_adapters(list(names))
    else:
        for name in names:
            model.delete_adapter(name)


class AdapterMixin(ExpertPipeline):
    """Loading and switching adapters of a pipeline's experts."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, torch.Tensor],
        *,
        expert: str,
        adapter_name: str | None = None,
        text_encoder: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA, in diffusers' or Kohya's format, into one expert.

        Args:
            pretrained_model_name_or_path_or_dict: a `.safetensors` file, a folder, a hub id or a state dict.
            expert: whose UNet it is for.
            adapter_name: for `set_adapters`; by default the loader counts.
            text_encoder: whether its text encoder part is loaded too. All experts share the text encoder, so
                this must be said of a file that has such a part.
            kwargs: `weight_name`, `subfolder` and the hub's, as diffusers takes them.

        Raises:
            ValueError: without peft; an unknown expert, or one that isn't a UNet; an unanswered text encoder
                part; anything but a plain LoRA every tensor of which is of a layer of this model. Nothing of
                it is loaded then.
        """
        _check_peft()
        unet = self.expert_unet(expert)
        if architecture_of(unet) is not UNET:
            raise ValueError(f"LoRAs are loaded into a {UNET.class_name}, and {expert} is none")
        file = read_lora(pretrained_model_name_or_path_or_dict, unet.config, **kwargs)
        if text_encoder is None and file.has("text_encoder"):
            raise ValueError(
                "this LoRA has a part for the text encoder, which all experts share: say text_encoder=True "
                "to load it too, or text_encoder=False to leave it out"
            )
        models = {"unet": unet}
        if text_encoder and file.has("text_encoder"):
            models["text_encoder"] = self.text_encoder
        for part, model in models.items():
            file.check_fit(part, model)
            if adapter_name in getattr(model, "peft_config", {}):
                raise ValueError(f"there is an adapter {adapter_name!r} already: choose another adapter_name")
        before = {part: _adapters(model) for part, model in models.items()}
        settings = dict(
            network_alphas=file.alphas, adapter_name=adapter_name, metadata=file.metadata, _pipeline=self
        )
        try:
            with self._with_expert(expert):
                StableDiffusionLoraLoaderMixin.load_lora_into_unet(file.tensors, unet=unet, **settings)
            if "text_encoder" in models:
                StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
                    file.tensors, text_encoder=self.text_encoder, **settings
                )
        except BaseException:
            for part, model in models.items():
                _forget(model, _adapters(model) - before[part])
            raise

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[float] | None = None,
        *,
        expert: str,
    ) -> None:
        """Which of an expert's adapters act, and how strongly.

        Args:
            adapter_names: as given to `load_lora_weights`.
            adapter_weights: one for all or one each, 1 by default.
            expert: whose.
        """
        _check_peft()
        chosen = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        known = list(getattr(self.expert_unet(expert), "peft_config", {}))
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise ValueError(f"{expert} has no adapter {unknown[0]!r}; it has {listed(known) or 'none'}")
        self.expert_unet(expert).set_adapters(chosen, adapter_weights)

    def fuse_lora(self, *, expert: str, lora_scale: float = 1.0) -> None:
        """Add an expert's active adapters to its weights."""
        _check_peft()
        with self._with_expert(expert):
            self.expert_unet(expert).fuse_lora(lora_scale=lora_scale)

    def unload_lora_weights(self, *, expert: str | None = None) -> None:
        """Take one expert's adapters out again, or all there are; fused ones stay in the weights."""
        _check_peft()
        for name in self.expert_names if expert is None else [expert]:
            _remove_all(self.expert_unet(name))
        if expert is None:
            _remove_all(self.text_encoder)
