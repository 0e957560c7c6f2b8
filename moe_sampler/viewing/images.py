"""Writing images: settings in the PNG's metadata, whole files or none."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

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
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: create it first")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"{path} is not writable")


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once everything is written to it, and else leaves no trace."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write the whole file or nothing. `settings` go into the metadata as JSON, for `read_settings`."""
    info = PngInfo()
    if settings is not None:
        info.add_itxt(_KEY, json.dumps(dict(settings), ensure_ascii=False))
    with _whole_file(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def save_latents(latents: Any, path: Path, settings: Mapping[str, Any]) -> None:
    """Write latents [B, C, h, w] under that name into a .safetensors file, the whole file or nothing, with
    `settings` in the metadata."""
    from safetensors.torch import save

    metadata = {_KEY: json.dumps(dict(settings), ensure_ascii=False)}
    with _whole_file(path) as file:
        file.write(save({"latents": latents.cpu().contiguous()}, metadata))


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
    with _whole_file(path) as file:
        # The texture of the first previews is noise, which compresses badly without loss.
        first.save(file, format="WEBP", quality=90, method=4, **options)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings an image was made with.

    Raises:
        ValueError: not an image, or not one of ours.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(_KEY)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    if text is None:
        raise ValueError(f"{path} has no moe-sampler settings in its metadata")
    return json.loads(text)


def zoom(image: Image.Image, factor: int) -> Image.Image:
    """Enlarged by a whole factor, bicubic."""
    if factor < 1:
        raise ValueError(f"zoom must be at least 1, got {factor}")
    return (
        image
        if factor == 1
        else image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    )
