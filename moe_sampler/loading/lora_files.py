"""A LoRA file: what it is, and whether every tensor of it belongs to a layer of the model it is for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import CheckpointError, first_line, listed

__all__ = ["LoraFile", "check_kind", "read_lora"]

PARTS = ("unet", "text_encoder")
_USUAL_NAME = "pytorch_lora_weights.safetensors"

# What else trainers call an adapter, by what its keys hold; the first that fits names the file.
_OTHER_KINDS = (
    ("a LoHa (LyCORIS)", r"\bhada_"),
    ("a LoKr (LyCORIS)", r"\blokr_"),
    ("an OFT", r"\b(oft_|oft_blocks|boft)"),
    ("an (IA)³", r"\bon_input\b"),
    ("a GLoRA", r"\.[ab][12]\.weight$"),
    ("a DoRA", r"dora_scale|lora_magnitude_vector"),
    ("a LoCon with a Tucker core", r"\blora_mid\b"),
    ("full differences of weights (LyCORIS)", r"\.(diff|diff_b|w_norm|b_norm|set_weight)$"),
    ("a LoRA with a textual inversion embedding bundled", r"^(bundle_emb|emb_params|string_to_param)"),
    ("a LoRA of SDXL", r"^(lora_te2_|text_encoder_2\.)"),
    ("a LoRA of Flux", r"(double|single)_blocks_?\d|[._]single_transformer_blocks[._]|double_blocks\."),
    ("a LoRA of a diffusion transformer", r"^(transformer\.|lora_transformer_|diffusion_model\.|lora_te3_)"),
)
_TEXT_LAYER = re.compile(
    r"attn2[._].*to_[kv]\b.*(lora_down|down|lora_A)\.weight$|attn2[._](processor\.)?to_[kv]_lora.*down"
)
_BASE_OF_TEXT = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
_LORA_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.(?P<what>weight|bias)")


def check_kind(keys: Collection[str], where: str) -> None:
    """Refuse other adapters than plain LoRAs, and LoRAs of other models, by their keys alone.

    Raises:
        CheckpointError: what the file is, and the keys that say so.
    """
    for kind, pattern in _OTHER_KINDS:
        found = [key for key in keys if re.search(pattern, key)]
        if found:
            raise CheckpointError(
                f"{where} is {kind}, and only plain LoRAs of Stable Diffusion's UNet are supported: it holds "
                f"{listed(found)}"
            )


def _check_base(tensors: Mapping[str, torch.Tensor], text_channels: int, where: str) -> None:
    for key, tensor in tensors.items():
        if _TEXT_LAYER.search(key) and tensor.ndim > 1 and tensor.shape[1] != text_channels:
            base = _BASE_OF_TEXT.get(tensor.shape[1], "another model")
            raise CheckpointError(
                f"{where} is a LoRA of {base}: its {key} takes text of {tensor.shape[1]} channels, and this "
                f"model's has {text_channels}"
            )


@dataclass(frozen=True)
class LoraFile:
    """A LoRA under diffusers' names.

    Args:
        where: the file, for messages.
        tensors: by key, which begins with "unet." or "text_encoder.".
        alphas: by layer, of Kohya's files.
        metadata: of PEFT's files.
    """

    where: str
    tensors: dict[str, Any]
    alphas: Any
    metadata: Any

    def has(self, part: str) -> bool:
        return any(key.startswith(f"{part}.") for key in self.tensors)

    def check_fit(self, part: str, model: torch.nn.Module) -> None:
        """Refuse a part whose tensors aren't all of a layer of the model, in whole pairs of its shape.

        Args:
            part: "unet" or "text_encoder".
            model: on the meta device will do.

        Raises:
            CheckpointError: names up to five of each problem.
        """
        layers = dict(model.named_modules())
        pairs: dict[str, dict[str, torch.Tensor]] = {}
        foreign: list[str] = []
        for key, tensor in _under_peft_names(part, self.tensors).items():
            name = key if hasattr(model, "text_model") else key.removeprefix("text_model.")
            match = _LORA_KEY.fullmatch(name)
            if match is None or not _is_adaptable(layers.get(match["layer"])):
                foreign.append(key)
            elif match["what"] == "weight":
                pairs.setdefault(match["layer"], {})[match["side"]] = tensor
        alone = [layer for layer, pair in pairs.items() if len(pair) < 2]
        wrong = [
            f"{layer} ({_shapes(pair)})" for layer, pair in pairs.items() if not _fits(pair, layers[layer])
        ]
        problems = {"of no layer": foreign, "half of a pair": alone, "misshapen": wrong}
        found = [f"{problem}: {listed(names)}" for problem, names in problems.items() if names]
        if found:
            raise CheckpointError(
                f"{self.where} is no LoRA of this {type(model).__name__}; {'; '.join(found)}"
            )


def _under_peft_names(part: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    own = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
    if all(".lora_A." in key or ".lora_B." in key for key in own):
        return own
    if part == "unet":
        return convert_unet_state_dict_to_peft(own)
    return convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))


def _weight(layer: torch.nn.Module) -> torch.Tensor:
    """Of the layer itself, under the adapters it may have."""
    return cast(torch.Tensor, getattr(layer, "base_layer", layer).weight)


def _is_adaptable(layer: torch.nn.Module | None) -> bool:
    return isinstance(getattr(layer, "base_layer", layer), torch.nn.Linear | torch.nn.Conv2d)


def _fits(pair: Mapping[str, torch.Tensor], layer: torch.nn.Module) -> bool:
    if len(pair) < 2:
        return True
    weight, a, b = _weight(layer), pair["A"], pair["B"]
    if not a.ndim == b.ndim == weight.ndim:
        return False
    return a.shape[1:] == weight.shape[1:] and b.shape[0] == weight.shape[0] and a.shape[0] == b.shape[1]


def _shapes(pair: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{side} {'×'.join(map(str, tensor.shape))}" for side, tensor in sorted(pair.items()))


def _name_in(source: str, subfolder: str | None) -> str | None:
    """The file to read where `source` is on this machine: older diffusers want it said when they are offline.

    Raises:
        CheckpointError: a folder that holds none, or leaves the choice.
    """
    place = Path(source)
    if place.is_file():
        return _USUAL_NAME  # of a file diffusers reads the file, whatever its name
    if not place.is_dir():
        return None
    folder = place / (subfolder or "")
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1 or _USUAL_NAME in found:
        return _USUAL_NAME if _USUAL_NAME in found else found[0]
    if not found:
        raise CheckpointError(f"{folder} holds no .safetensors file")
    raise CheckpointError(f"{folder} holds several files, {listed(found)}: say which as weight_name")


def read_lora(
    source: str | Path | Mapping[str, torch.Tensor], unet_config: Mapping[str, Any], **where: Any
) -> LoraFile:
    """A LoRA of a Stable Diffusion UNet, in diffusers', PEFT's or Kohya's format.

    Args:
        source: a `.safetensors` file, a folder, a hub id, or the tensors by key.
        unet_config: of the UNet it is for.
        where: `weight_name`, `subfolder` and the hub's, as diffusers takes them.

    Raises:
        CheckpointError: not there, not one, damaged, another kind of adapter, or of another model.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.loaders.lora_base import _fetch_state_dict
    from safetensors import SafetensorError

    name = "the LoRA" if isinstance(source, Mapping) else str(source)
    hub = dict.fromkeys(
        (
            *("weight_name", "local_files_only", "cache_dir", "force_download", "proxies", "token"),
            *("revision", "subfolder"),
        )
    )
    unknown = sorted(where.keys() - hub.keys())
    if unknown:
        raise TypeError(f"load_lora_weights takes no {listed(unknown)}: it takes {', '.join(sorted(hub))}")
    file = where.get("weight_name")
    if file is not None and not str(file).endswith(".safetensors"):  # diffusers would unpickle it
        raise CheckpointError(f"{name}: {file} is no .safetensors file, and LoRAs are read from these alone")
    if file is None and not isinstance(source, Mapping):
        where["weight_name"] = _name_in(str(source), where.get("subfolder"))
    agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    try:
        # diffusers drops some tensors on its way to its own names, so they are looked at before.
        raw, metadata = _fetch_state_dict(
            dict(source) if isinstance(source, Mapping) else str(source),
            use_safetensors=True,
            user_agent=agent,
            allow_pickle=False,
            **{**hub, **where},
        )
        check_kind(raw, name)
        _check_base(raw, unet_config["cross_attention_dim"], name)
        found = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(raw), unet_config=unet_config)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, IndexError, SafetensorError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"{name}: {reason[:400] or first_line(error)}") from error
    tensors, alphas = cast("tuple[dict[str, Any], Any]", found)
    foreign = [key for key in tensors if not key.startswith(tuple(f"{part}." for part in PARTS))]
    if foreign or not any(key.startswith("unet.") for key in tensors):
        raise CheckpointError(f"{name} is no LoRA of a UNet: it holds {listed(foreign or list(tensors))}")
    return LoraFile(name, tensors, alphas, metadata)
