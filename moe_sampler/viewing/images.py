"""Writing images: settings in their metadata, whole files or none."""

from __future__ import annotations

import io
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
    "FORMATS",
    "check_image_name",
    "check_room",
    "check_writable",
    "encoded_image",
    "read_settings",
    "save_image",
    "save_latents",
    "save_png",
    "save_webp",
    "zoom",
    "zoom_factor",
]

_KEY = "moe-sampler"
FORMATS = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "quality": 95, "method": 4},
}
"""How Pillow writes a picture, by its file's ending."""
# Exif 2.32. The user comment's first eight bytes name its encoding; "Unicode" is UTF-16, as others write and
# read their parameters there.
_DESCRIPTION, _EXIF_IFD, _USER_COMMENT, _UNICODE = 0x010E, 0x8769, 0x9286, b"UNICODE\0"
_PARAMETERS = "parameters"
_JPEG_ROOM = 65_000
"""Bytes of EXIF that a JPEG file holds in its one segment of 65,533, some of which the format takes."""
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


def check_image_name(path: Path) -> None:
    """Raise now if an image could not be written to `path` later, as its ending says."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{path}: images are written as PNG, JPEG or WebP, so give a name that ends in .png, .jpg or "
            ".webp"
        )
    check_writable(path, path.suffix.lower())


def check_room(path: Path, settings: Mapping[str, Any], parameters: str = "") -> None:
    """Raise now if the format of `path` is JPEG and these settings are more than it holds."""
    room = len(_description(settings)) + len(_comment(parameters))
    if path.suffix.lower() in (".jpg", ".jpeg") and room > _JPEG_ROOM:
        raise ValueError(f"{path}: a JPEG holds 64 kB of settings, and these are more: use .png or .webp")


def save_png(
    image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None, parameters: str = ""
) -> None:
    """Write the whole file or nothing. `settings` go into the metadata as JSON, for `read_settings`, and
    `parameters` for other programs, as `parameters_text` makes it."""
    encoded = _png(image, settings, parameters)
    write_whole(path, lambda temporary: temporary.write_bytes(encoded))


def _description(settings: Mapping[str, Any]) -> str:
    return json.dumps({_KEY: dict(settings)})  # in ASCII, as the tag is


def _comment(parameters: str) -> bytes:
    return _UNICODE + parameters.encode("utf-16-be", "surrogatepass") if parameters else b""


def _png(image: Image.Image, settings: Mapping[str, Any] | None, parameters: str) -> bytes:
    info = PngInfo()
    if settings is not None:
        info.add_itxt(_KEY, json.dumps(dict(settings), ensure_ascii=False))
    if parameters:
        info.add_text(_PARAMETERS, parameters)  # as UTF-8 where Latin-1 hasn't got it
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def encoded_image(
    image: Image.Image, name: str | Path, settings: Mapping[str, Any], parameters: str = ""
) -> bytes:
    """A file's bytes, in the format that its name's ending says. `settings` go into a PNG's text, or into the
    EXIF description of a JPEG or WebP file, for `read_settings`; `parameters`, as `parameters_text` makes it,
    to where other programs look for it: a text of that name, or the user comment.

    Raises:
        ValueError: more settings than a JPEG holds.
    """
    options = FORMATS[Path(name).suffix.lower()]
    if options["format"] == "PNG":
        return _png(image, settings, parameters)
    check_room(Path(name), settings, parameters)
    exif = Image.Exif()
    exif[_DESCRIPTION] = _description(settings)
    if parameters:
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _comment(parameters)
    file = io.BytesIO()
    image.convert("RGB").save(file, exif=exif, **options)
    return file.getvalue()


def save_image(image: Image.Image, path: Path, settings: Mapping[str, Any], parameters: str = "") -> None:
    """Write the whole file or nothing, as `encoded_image` makes it."""
    # Through memory: Pillow's JPEG encoder doesn't notice that a full disk took the first bytes only.
    encoded = encoded_image(image, path, settings, parameters)
    write_whole(path, lambda temporary: temporary.write_bytes(encoded))


def _settings_text(image: Image.Image) -> str | None:
    """The JSON of an image's settings; None where it has none."""
    if _KEY in image.info:
        return image.info[_KEY]
    described = image.getexif().get(_DESCRIPTION)
    if not isinstance(described, str) or not described.startswith('{"' + _KEY):
        return None
    return json.dumps(json.loads(described)[_KEY])


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
            text = _settings_text(image)
    except Exception as error:  # Pillow's readers raise a dozen kinds for damaged files
        raise ValueError(f"{path} cannot be read as an image: {first_line(error)}") from None
    if not isinstance(text, str):
        raise ValueError(f"{path} has no moe-sampler settings in its metadata")
    settings = parse_json(text, f"{path}'s settings", ValueError)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}'s settings are damaged: no JSON object")
    return settings


def zoom_factor(size: tuple[int, int], side: int = 512) -> int:
    """The whole factor that brings the longer side nearest to so many pixels."""
    return max(1, round(side / max(size)))


def zoom(image: Image.Image, factor: int) -> Image.Image:
    """Enlarged by a whole factor, bicubic."""
    if factor < 1:
        raise ValueError(f"zoom must be at least 1, got {factor}")
    return (
        image
        if factor == 1
        else image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    )
