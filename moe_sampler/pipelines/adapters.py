"""LoRA adapters, each for one expert, through diffusers' PEFT loader."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import get_adapter_name, is_peft_available

from ..architectures import architecture_of
from ..architectures.unet import UNET
from ..errors import listed
from ..loading.lora_files import read_lora
from ..publishing.card import quoted
from ..publishing.lora import PEFT_SETTINGS, adapter_of, write_lora
from ..publishing.modelspec import describe_model
from ..publishing.upload import Address, saved
from .base import ExpertPipeline
from .text_adapters import activate, active, adapters, fuse, keeping_names, remove, remove_all, text_name

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
        name = adapter_name or get_adapter_name(unet)
        names = {"unet": name, "text_encoder": text_name(expert, name)}
        for part, model in models.items():
            file.check_fit(part, model)
            if names[part] in adapters(model):
                raise ValueError(f"{expert} has an adapter {name!r} already: choose another adapter_name")
        others = active(self.text_encoder)
        settings = dict(network_alphas=file.alphas, metadata=file.metadata, _pipeline=self)
        load = StableDiffusionLoraLoaderMixin
        try:
            with self._with_expert(expert):
                load.load_lora_into_unet(file.tensors, unet=unet, adapter_name=name, **settings)
            if "text_encoder" in models:
                with keeping_names(self.text_encoder):
                    load.load_lora_into_text_encoder(
                        file.tensors,
                        text_encoder=self.text_encoder,
                        adapter_name=names["text_encoder"],
                        **settings,
                    )
                activate(self.text_encoder, expert, others, {name: 1.0})
        except BaseException:
            for part, model in models.items():
                remove(model, {names[part]} & adapters(model))
            raise

    def save_lora_weights(
        self,
        save_directory: str | Path,
        *,
        expert: str,
        adapter_name: str | None = None,
        push_to_hub: bool = False,
        license: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write an expert's adapter in diffusers' format, as `load_lora_weights` here and elsewhere reads it,
        with a card.

        Args:
            save_directory: created if need be.
            expert: whose.
            adapter_name: which; not needed where there is but one.
            push_to_hub: upload the folder, too; kwargs are those of `publishing.upload.Target`.
            license: the LoRA's, as the hub calls it.

        Raises:
            ValueError: without peft; an unknown expert; no such adapter, or several and none named.
            CheckpointError: the hub doesn't take it.
            OSError: the folder can't be written.
        """
        _check_peft()
        known = list(getattr(self.expert_unet(expert), "peft_config", {}))
        chosen = known if adapter_name is None else [name for name in known if name == adapter_name]
        if len(chosen) != 1:
            wanted = "no adapter" if adapter_name is None else f"no adapter {adapter_name!r}"
            what = f"several adapters, {listed(chosen)}: say which" if chosen else wanted
            raise ValueError(
                f"{expert} has {what}" + ("" if chosen else f"; it has {listed(known) or 'none'}")
            )
        write = partial(self._write_lora, Path(save_directory), license, expert, chosen[0])
        saved(write, save_directory, "LoRA", push_to_hub, **kwargs)

    def _write_lora(
        self, final: Path, license: str | None, expert: str, name: str, folder: Path, address: Address
    ) -> None:
        unet = self.expert_unet(expert)
        tensors, settings = adapter_of(unet, name, "unet")
        half = text_name(expert, name)
        if half in adapters(self.text_encoder):
            own, more = adapter_of(self.text_encoder, half, "text_encoder")
            tensors, settings = tensors | own, settings | more
        described = describe_model(f"{type(unet).__name__}/lora", Path(address.source).name, license=license)
        described |= {PEFT_SETTINGS: json.dumps(settings, sort_keys=True)}
        has_text = any(key.startswith("text_encoder.") for key in tensors)
        write_lora(
            folder,
            tensors,
            described,
            address=address,
            imports="from moe_sampler import HybridPipeline",
            pipe=None if self._loaded_by is None else f"pipe = HybridPipeline.{self._loaded_by}",
            more=f", expert={quoted(expert)}" + (", text_encoder=True" if has_text else ""),
            of=f"the expert {expert}",
            license=license,
            final=final,
        )

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[float] | None = None,
        *,
        expert: str,
    ) -> None:
        """Which of an expert's adapters act, and how strongly, with their halves in the text encoder.

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
        weights = (
            list(adapter_weights)
            if isinstance(adapter_weights, Sequence)
            else [adapter_weights] * len(chosen)
        )
        scales = {name: 1.0 if w is None else w for name, w in zip(chosen, weights, strict=True)}
        activate(self.text_encoder, expert, active(self.text_encoder), scales)

    def fuse_lora(self, *, expert: str, lora_scale: float = 1.0) -> None:
        """Add an expert's active adapters to its weights, and their halves to the text encoder's."""
        _check_peft()
        with self._with_expert(expert):
            self.expert_unet(expert).fuse_lora(lora_scale=lora_scale)
        fuse(self.text_encoder, expert, lora_scale)

    def unload_lora_weights(self, *, expert: str | None = None) -> None:
        """Take one expert's adapters out again, or all there are; fused ones stay in the weights."""
        _check_peft()
        for name in self.expert_names if expert is None else [expert]:
            remove_all(self.expert_unet(name))
            own = {each for each in adapters(self.text_encoder) if each.startswith(text_name(name, ""))}
            remove(self.text_encoder, own)
