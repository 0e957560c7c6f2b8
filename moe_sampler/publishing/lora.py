"""A LoRA's folder: its file with what it says of itself, and its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .card import card_text, loading, write_card
from .modelspec import stamp
from .upload import Address

__all__ = ["WEIGHTS", "write_lora"]

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file's name, as diffusers' trainers have it."""


def write_lora(
    folder: Path,
    tensors: Mapping[str, Tensor],
    described: Mapping[str, str],
    *,
    address: Address,
    imports: str,
    pipe: str | None,
    more: str = "",
    of: str,
    license: str | None,
    final: Path | None,
    tags: Sequence[str] = (),
) -> None:
    """Write the file and the card.

    Args:
        folder: to write to.
        tensors, described: of the file, and its header.
        address: where the folder will be.
        imports, pipe: lines of Python that make the pipeline `pipe`; None where nobody knows of what.
        more: further arguments of its `load_lora_weights`, after ", ".
        of: what the LoRA is for, in words.
        license: its identifier on the hub.
        final: where the folder's files get their places.
        tags: of the card.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / WEIGHTS, {"format": "pt"})
    stamp([folder / WEIGHTS], described)
    title = Path(address.source).name
    load = f"pipe.load_lora_weights({address.arguments}{more})"
    told = f"On the pipeline that it was made for: `{load}`."
    if pipe is not None:
        told = loading(imports, [pipe, load, 'image = pipe("a castle by a lake", seed=0).images[0]'])
    text = card_text(
        title,
        [f"A LoRA of {of}, for moe-sampler.", "## Loading", told],
        license=license,
        tags=["lora", *tags],
        library_name="diffusers",
        pipeline_tag="text-to-image",
    )
    write_card(folder, text, final)
