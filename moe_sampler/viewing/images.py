"""Writing images: settings in the PNG's metadata, whole files or none."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .._files import write_whole
from .._readers import parse_json
from ..errors import first_line

__all__ = [
    "check_writable",
    "read_settings",
    "save_latents",
    "save_png",
    "save_webp",
    "zoom",
]

_KEY = "moe-sampler"
_KINDS = {
    ".png": "images are written as PNG",
    ".webp": "animations are written as WebP",
    ".safetensors": "latents are written as safetensors",
}


def check_writable(path: Path, suffix: str = ".png") -> None:
    """Raise now if a PNG, or with another suffix an animation or latents, could not be written to `path`
    later."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: {_KINDS[suffix]}, so give a name that ends in {suffix}")
    if path.is_symlink():
        raise ValueError(f"{path} is a link, which is not written through: remove it, or give another name")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file: give another name")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: create it first")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"{path} is not writable")


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write the whole file or nothing. `settings` go into the metadata as JSON, for `read_settings`."""
    info = PngInfo()
    if settings is not None:
        info.add_itxt(_KEY, json.dumps(dict(settings), ensure_ascii=False))
    write_whole(path, lambda file: image.save(file, format="PNG", pnginfo=info))


def save_latents(latents: Any, path: Path, settings: Mapping[str, Any]) -> None:
    """Write latents [B, C, h, w] under that name into a .safetensors file, the whole file or nothing, with
    `settings` in the metadata."""
    from safetensors.torch import save_file

    metadata = {_KEY: json.dumps(dict(settings), ensure_ascii=False)}
    own = {"latents": latents.cpu().contiguous()}
    write_whole(path, lambda file: save_file(own, file, metadata))


def save_webp(frames: Sequence[Image.Image], durations: Sequence[int], path: Path) -> None:
    """Write an animation that repeats for ever, the whole file or nothing.

    Args:
        frames: of one size.
        durations: of each frame, in milliseconds.
        path: of a .webp file.
    """
    if len(frames) != len(durations) or not frames:
        raise ValueError(
            f"as many durations as frames, and at least one: got {len(durations)} and {len(frames)}"
        )
    first, *others = frames
    options = dict(save_all=True, append_images=others, duration=list(durations), loop=0)
    # The texture of the first previews is noise, which compresses badly without loss.
    write_whole(path, lambda file: first.save(file, format="WEBP", quality=90, method=4, **options))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings an image was made with.

    Raises:
        ValueError: not an image, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} cannot be read as an image: {'not a' if path.exists() else 'no such'} file")
    try:
        # Too many pixels are an error; what else Pillow would warn of, the settings do not depend on.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            text = image.info.get(_KEY)
    except Exception as error:  # Pillow's readers raise a dozen kinds for damaged files
        raise ValueError(f"{path} cannot be read as an image: {first_line(error)}") from None
    if not isinstance(text, str):
        raise ValueError(f"{path} has no moe-sampler settings in its metadata")
    settings = parse_json(text, f"{path}'s settings", ValueError)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}'s settings are damaged: no JSON object")
    return settings


def zoom(image: Image.Image, factor: int) -> Image.Image:
    """Enlarged by a whole factor, bicubic."""
    if factor < 1:
        raise ValueError(f"zoom must be at least 1, got {factor}")
    return (
        image
        if factor == 1
        else image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    )
