"""What a student's folder holds beside its config and weights: the class's name as code, a card, a header."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_sampler._files import write_text
from moe_sampler.loading.hub import is_hub_id
from moe_sampler.publishing.card import card_text, loading, quoted, table
from moe_sampler.publishing.lora import write_lora
from moe_sampler.publishing.modelspec import describe_model
from moe_sampler.publishing.upload import Address

__all__ = [
    "CONFIG_SHOWN",
    "REFERENCE",
    "describe_student",
    "loading_sections",
    "student_card",
    "write_model_reference",
    "write_student_lora",
]

_MODULE = "tinyflux"
REFERENCE = f"{_MODULE}.py"
_CODE = '''"""The class of this folder's model, for diffusers' AutoModel. It is in the package moe-sampler."""

from moe_sampler.tinyflux import TinyFlux

__all__ = ["TinyFlux"]
'''
_PLACES = ("encoders", "vae", "clip", "t5")
CONFIG_SHOWN = ("hidden_size", "num_attention_heads", "num_double_layers", "num_single_layers", "in_channels")
CONFIG_SHOWN += ("joint_attention_dim", "sample_size", "text_mask", "schedule", "null_condition")


def write_model_reference(folder: Path) -> None:
    """Add `tinyflux.py`, named in the folder's config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModel": f"{_MODULE}.TinyFlux"}
    write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(folder / REFERENCE, _CODE)


def describe_student(
    title: str,
    config: Mapping[str, Any],
    license: str | None = None,
    *,
    lora: bool = False,
    scale: int | None = None,
) -> dict[str, str]:
    """The header of its weights, or a LoRA's, after ModelSpec.

    scale: pixels a side of one latent pixel, where its VAE is known.
    """
    size = config["sample_size"]
    side = None if size is None or scale is None else (scale * size[1], scale * size[0])
    return describe_model(
        "tinyflux/lora" if lora else "tinyflux",
        title,
        implementation="moe-sampler",
        prediction=None if lora else "reversed_flow_prediction",
        resolution=side,
        license=license,
    )


def loading_sections(config: Mapping[str, Any], address: Address) -> list[str]:
    """How a student alone is loaded; to paint, where its config names encoders that can be had there."""
    places = [place for name, place in (config["encoders"] or {}).items() if name in _PLACES]
    local = Path(address.source).is_dir() or not is_hub_id(address.source)
    sections = [
        "## Loading",
        loading(
            "from moe_sampler.tinyflux import TinyFlux",
            [f"student = TinyFlux.from_pretrained({address.arguments})"],
        ),
        "Through diffusers' own loader, with moe-sampler installed, which `tinyflux.py` imports:",
        loading(
            "from diffusers import AutoModel",
            [f"student = AutoModel.from_pretrained({address.arguments}, trust_remote_code=True)"],
        ),
    ]
    if places and all(local or is_hub_id(place) for place in places):
        sections += [
            "To make images:",
            loading(
                "from moe_sampler.tinyflux import StudentPipeline",
                [
                    f"pipe = StudentPipeline.from_pretrained({address.arguments})",
                    'image = pipe("a castle by a lake", seed=0).images[0]',
                ],
            ),
        ]
    else:
        sections.append(
            "To make images it wants the VAE and text encoders it was trained with: "
            "`StudentPipeline.from_pretrained(..., encoders=...)`."
        )
    return sections


def student_card(
    title: str,
    config: Mapping[str, Any],
    address: Address,
    license: str | None,
    sections: Sequence[str] = (),
) -> str:
    """The card of a student's folder."""
    shown = table({f"`{name}`": config[name] for name in CONFIG_SHOWN})
    return card_text(
        title,
        [
            "A TinyFlux, the student of moe-sampler: a small Flux-like transformer.",
            *loading_sections(config, address),
            *sections,
            "## Config",
            shown,
        ],
        license=license,
        tags=["tinyflux"],
        library_name="diffusers",
        pipeline_tag="text-to-image",
    )


def write_student_lora(
    base: str | None,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    final: Path | None,
    license: str | None,
    folder: Path,
    address: Address,
) -> None:
    """A LoRA's file and card.

    Args:
        base: what a `StudentPipeline` of its student is loaded from, where that is known.
        config: the student's.
        tensors: as `lora_tensors` makes them.
        final: where the folder's files get their places.
    """
    write_lora(
        folder,
        tensors,
        describe_student(Path(address.source).name, config, license, lora=True),
        address=address,
        imports="from moe_sampler.tinyflux import StudentPipeline",
        pipe=None if base is None else f"pipe = StudentPipeline.from_pretrained({quoted(base)})",
        of="a TinyFlux student",
        license=license,
        final=final,
        tags=["tinyflux"],
    )
