"""A LoRA's folder: its file with what it says of itself, and its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .card import card_text, loading, write_card
from .modelspec import stamp
from .upload import Address

__all__ = ["PEFT_SETTINGS", "WEIGHTS", "adapter_of", "write_lora"]

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file's name, as diffusers' trainers have it."""

PEFT_SETTINGS = "lora_adapter_metadata"
"""In the header: ranks and alphas, as diffusers writes and reads them."""


def adapter_of(model: Any, name: str, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(An adapter's tensors, its settings), as diffusers' files and their headers have them.

    Args:
        model: that PEFT put the adapter into.
        name: of the adapter.
        part: begins the names.
    """
    from peft.utils import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, adapter_name=name)
    settings = model.peft_config[name].to_dict()
    return (
        {f"{part}.{key}": tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
        {f"{part}.{key}": sorted(v) if isinstance(v, set) else v for key, v in settings.items()},
    )


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
