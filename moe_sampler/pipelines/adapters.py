"""LoRA adapters, each for one expert, through diffusers' PEFT loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import is_peft_available, recurse_remove_peft_layers
from safetensors import SafetensorError

from ..architectures import architecture_of
from ..architectures.unet import UNET
from ..errors import CheckpointError, first_line, listed
from .base import ExpertPipeline

__all__ = ["AdapterMixin"]


def _check_peft() -> None:
    if not is_peft_available():
        raise ValueError("LoRA adapters need the package peft: pip install peft")


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
                part; no LoRA.
        """
        _check_peft()
        unet = self.expert_unet(expert)
        if architecture_of(unet) is not UNET:
            raise ValueError(f"LoRAs are loaded into a {UNET.class_name}, and {expert} is none")
        source = pretrained_model_name_or_path_or_dict
        source = dict(source) if isinstance(source, Mapping) else str(source)
        try:
            found = StableDiffusionLoraLoaderMixin.lora_state_dict(
                source, use_safetensors=True, return_lora_metadata=True, unet_config=unet.config, **kwargs
            )
        except (OSError, ValueError, SafetensorError) as error:
            what = source if isinstance(source, str) else "LoRA"
            raise CheckpointError(f"{what}: {first_line(error)}") from error
        state, alphas, metadata = cast("tuple[dict[str, Any], Any, Any]", found)
        foreign = [key for key in state if not key.startswith(("unet.", "text_encoder."))]
        if foreign or not any(key.startswith("unet.") for key in state):
            raise CheckpointError(f"this is no LoRA of a UNet: it holds {listed(foreign or list(state))}")
        if text_encoder is None and any(key.startswith("text_encoder.") for key in state):
            raise ValueError(
                "this LoRA has a part for the text encoder, which all experts share: say text_encoder=True "
                "to load it too, or text_encoder=False to leave it out"
            )
        with self._with_expert(expert):
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(
                state,
                network_alphas=alphas,
                unet=unet,
                adapter_name=adapter_name,
                metadata=metadata,
                _pipeline=self,
            )
        if text_encoder:
            StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
                state,
                network_alphas=alphas,
                text_encoder=self.text_encoder,
                adapter_name=adapter_name,
                metadata=metadata,
                _pipeline=self,
            )

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
            unet = self.expert_unet(name)
            if getattr(unet, "peft_config", None):
                unet.unload_lora()
        if expert is None and getattr(self.text_encoder, "peft_config", None):
            recurse_remove_peft_layers(self.text_encoder)
            del self.text_encoder.peft_config
            self.text_encoder._hf_peft_config_loaded = False
