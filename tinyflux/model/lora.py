"""LoRA of the student (Hu et al. 2021, arXiv:2106.09685): W + scale·alpha/rank·B·A; train, load, merge.

Files are safetensors with names that ComfyUI reads for any model, a module's own after `diffusion_model.`:

    diffusion_model.double_blocks.0.attn.img_qkv.lora_A.weight    [rank, in]
    diffusion_model.double_blocks.0.attn.img_qkv.lora_B.weight    [out, rank]
    diffusion_model.double_blocks.0.attn.img_qkv.alpha            []

Read are these, the same without prefix or after PEFT's and diffusers' (`base_model.model.`, `transformer.`),
Kohya's (`lora_unet_double_blocks_0_attn_img_qkv.lora_down.weight`), and upstream TinyFlux's
(`double_blocks_0_attn_img_qkv.lora_A`). Where a file has no alpha it is the rank.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_sampler.errors import CheckpointError, listed
from moe_sampler.loading.hub import Hub
from moe_sampler.loading.state_dicts import read_safetensors
from moe_sampler.publishing.lora import WEIGHTS

__all__ = [
    "TARGETS",
    "WEIGHTS",
    "LoraLayer",
    "add_lora",
    "fuse_lora",
    "lora_file",
    "lora_tensors",
    "merge_lora",
    "placed_lora",
    "put_lora",
    "read_lora",
    "scales",
    "set_scales",
    "take_lora",
]

TARGETS = ("txt_qkv", "img_qkv", "txt_out", "img_out", "qkv", "out_proj", "fc1", "fc2")
"""The blocks' attention and MLPs."""
_OURS = "diffusion_model."
_PREFIXES = (_OURS, "transformer.", "base_model.model.", "model.", "lora_transformer_", "lora_unet_")
_SIDES = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B"}
_KEY = re.compile(r"(?P<layer>.+)\.(?P<side>lora_A|lora_B|lora_down|lora_up)(\.default)?(\.weight)?")
_IN_BLOCKS = r"(double|single)_blocks\.\d+\..*\b({})"


class LoraLayer(NamedTuple):
    """A: [rank, in]. B: [out, rank]. alpha: divided by the rank, the product's scale."""

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.A)


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    *,
    targets: Sequence[str] = TARGETS,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Give a student adapters to train, zero at first, by PEFT; everything else of it is frozen.

    Args:
        model: the student.
        rank, alpha: of every adapter; alpha is the rank by default.
        targets: the last parts of the names of the blocks' linear layers.
        dropout: of what the adapters see.
        seed: of their initial weights.

    Raises:
        ValueError: no peft, or no layer of these names.
    """
    peft = _peft()
    chosen = "|".join(re.escape(target) for target in targets)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=_IN_BLOCKS.format(chosen),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, model)
        except ValueError:
            raise ValueError(f"no layer of the blocks is called {' or '.join(targets)}") from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def lora_file(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """What a file holds of a model's tensors by name, of which those of its adapters count."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            continue
        found[f"{_OURS}{match['layer']}.{match['side']}.weight"] = tensor
        found[f"{_OURS}{match['layer']}.alpha"] = torch.tensor(float(alpha))
    return found


def read_lora(
    source: str | os.PathLike,
    model: nn.Module,
    hub: Hub | None = None,
    *,
    weight_name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> dict[str, LoraLayer]:
    """A file's adapters by the names of the model's linear layers, every one of which fits.

    Args:
        source: a `.safetensors` file, a folder with `pytorch_lora_weights.safetensors`, a hub id or a hub
            file `owner/name:file`.
        model: the student.
        hub: how to ask the hub.
        weight_name: the file's name in the folder or repository.
        revision: of the hub repository.
        subfolder: of the folder or hub repository.

    Raises:
        CheckpointError: unreadable; tensors of no layer of this model, without their other half or of
            another shape, up to five named a kind.
    """
    place = (hub or Hub()).look(os.fspath(source), revision=revision, subfolder=subfolder)
    names = [WEIGHTS, "adapter_model.safetensors"] if weight_name is None else [weight_name]
    file = place.local() if place.is_file else place.need(names)
    state, metadata = read_safetensors(file)
    layers = {name: m for name, m in model.named_modules() if isinstance(_base(m), nn.Linear)}
    flat = {name.replace(".", "_"): name for name in layers}
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    foreign: list[str] = []
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        own = _layer(key.removesuffix(".alpha") if match is None else match["layer"], layers, flat)
        if own is None or (match is None and not key.endswith(".alpha")):
            foreign.append(key)
        elif match is None:
            alphas[own] = float(tensor)
        else:
            halves.setdefault(own, {})[_SIDES[match["side"]]] = tensor
    default = _upstreams_alpha(metadata, file)
    alone = [name for name, pair in halves.items() if len(pair) < 2]
    wrong = [name for name, pair in halves.items() if not _fits(pair, _base(layers[name]))]
    problems = {"of no layer": foreign, "half of a pair": alone, "misshapen": wrong}
    told = [f"{problem}: {listed(names)}" for problem, names in problems.items() if names]
    if told or not halves:
        raise CheckpointError(
            f"{file} is no LoRA of this {type(model).__name__}; {'; '.join(told) or 'it has no adapters'}"
        )
    return {
        name: LoraLayer(pair["A"], pair["B"], alphas.get(name, default or len(pair["A"])))
        for name, pair in halves.items()
    }


def put_lora(
    model: nn.Module, layers: Mapping[str, LoraLayer], name: str = "default", scale: float = 1.0
) -> None:
    """Adapters beside the weights, by PEFT: they act from now on, and `take_lora` takes them off.

    Args:
        model: the student.
        layers: as `read_lora` finds them.
        name: of the adapter.
        scale: how strongly they act.

    Raises:
        ValueError: no peft, or an adapter of this name is there already.
    """
    peft = _peft()
    if name in getattr(model, "peft_config", {}):
        raise ValueError(f"there is an adapter {name!r} already: choose another name")
    exact = {f"^{re.escape(path)}$": layer for path, layer in layers.items()}
    config = peft.LoraConfig(
        r=1,
        target_modules=list(layers),
        rank_pattern={path: layer.rank for path, layer in exact.items()},
        alpha_pattern={path: layer.alpha for path, layer in exact.items()},
        init_lora_weights=False,
    )
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    for path, layer in layers.items():
        own: Any = model.get_submodule(path)
        with torch.no_grad():
            own.lora_A[name].weight.copy_(layer.A)
            own.lora_B[name].weight.copy_(layer.B)
        own.lora_A[name].to(own.weight)
        own.lora_B[name].to(own.weight)
    set_scales(model, {**scales(model), name: scale})
    model.eval()


def placed_lora(model: nn.Module, name: str = "default") -> dict[str, LoraLayer]:
    """An adapter's layers by the names of the model's own, as `put_lora` or a training put them beside it.

    Raises:
        ValueError: there is no such adapter.
    """
    found: dict[str, LoraLayer] = {}
    for path, layer in model.named_modules():
        own: Any = layer
        if hasattr(layer, "lora_A") and name in own.lora_A:
            a, b = own.lora_A[name].weight.detach(), own.lora_B[name].weight.detach()
            found[path] = LoraLayer(a, b, float(own.lora_alpha[name]))
    if not found:
        known = listed(list(getattr(model, "peft_config", {}))) or "none"
        raise ValueError(f"there is no adapter {name!r}, but {known}")
    return found


def lora_tensors(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """What a file holds of an adapter, as `read_lora` reads it back."""
    found: dict[str, Tensor] = {}
    for path, layer in layers.items():
        found[f"{_OURS}{path}.lora_A.weight"] = layer.A.cpu().contiguous()
        found[f"{_OURS}{path}.lora_B.weight"] = layer.B.cpu().contiguous()
        found[f"{_OURS}{path}.alpha"] = torch.tensor(float(layer.alpha))
    return found


def scales(model: nn.Module) -> dict[str, float]:
    """How strongly each adapter acts, by its name."""
    return dict(getattr(model, "_lora_scales", {}))


def set_scales(model: nn.Module, wanted: Mapping[str, float]) -> None:
    """Which adapters act, and how strongly; others don't.

    Raises:
        ValueError: an adapter that isn't there.
    """
    known = getattr(model, "peft_config", {})
    for name in wanted:
        if name not in known:
            raise ValueError(f"there is no adapter {name!r}, but {listed(list(known)) or 'none'}")
    for layer in model.modules():
        if not hasattr(layer, "lora_A"):
            continue
        own: Any = layer
        there = [name for name in wanted if name in own.lora_A]
        own.set_adapter(there)
        for name in there:
            own.set_scale(name, wanted[name])
        own.requires_grad_(False)
    model._lora_scales = dict(wanted)  # pyright: ignore[reportArgumentType]


def take_lora(model: nn.Module) -> None:
    """Take all adapters off; the weights are as they were before."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "lora_A"):
            model.set_submodule(name, layer.get_base_layer())  # pyright: ignore[reportCallIssue]
    for attribute in ("peft_config", "_lora_scales"):
        if hasattr(model, attribute):
            delattr(model, attribute)


def fuse_lora(model: nn.Module) -> None:
    """Add the adapters that act to the weights, for good, and take them all off."""
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            own: Any = layer
            own.merge(safe_merge=True)
    take_lora(model)


@torch.no_grad()
def merge_lora(model: nn.Module, layers: Mapping[str, LoraLayer], scale: float = 1.0) -> None:
    """Add adapters to the weights themselves, for good; computed in float32.

    Args:
        model: the student.
        layers: as `read_lora` finds them.
        scale: how strongly they act.
    """
    for path, layer in layers.items():
        weight = _base(model.get_submodule(path)).weight
        assert isinstance(weight, Tensor)
        change = layer.B.to(weight.device).float() @ layer.A.to(weight.device).float()
        weight.copy_(weight.float() + scale * layer.alpha / layer.rank * change)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("LoRA adapters need the package peft: pip install peft") from None
    return peft


def _base(layer: nn.Module) -> nn.Module:
    """The layer itself, under the adapters it may have."""
    base = getattr(layer, "base_layer", layer)
    return base if isinstance(base, nn.Module) else layer


def _layer(name: str, layers: Mapping[str, nn.Module], flat: Mapping[str, str]) -> str | None:
    """The model's own name of a layer."""
    for prefix in ("", *_PREFIXES):
        own = name.removeprefix(prefix)
        if own in layers:
            return own
        if own in flat:
            return flat[own]
    return None


def _fits(pair: Mapping[str, Tensor], layer: nn.Module) -> bool:
    if len(pair) < 2:
        return True
    weight, a, b = layer.weight, pair["A"], pair["B"]
    assert isinstance(weight, Tensor)
    return a.ndim == b.ndim == 2 and a.shape[1] == weight.shape[1] and b.shape == (len(weight), len(a))


def _upstreams_alpha(metadata: Mapping[str, str], file: Path) -> float | None:
    """Upstream's trainer writes no alphas beside the tensors, but its settings into the metadata."""
    if "config_json" not in metadata:
        return None
    try:
        config = json.loads(metadata["config_json"])
        defaults = config["defaults"]
        alpha, rank = float(defaults["alpha"]), int(defaults["rank"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}'s settings can't be read: {error!r}") from None
    if any(config.get(kind) for kind in ("targets", "layer_specs", "extensions")):
        raise CheckpointError(f"{file} has adapters of several alphas, depths or new blocks: not supported")
    return alpha if alpha != rank else None
