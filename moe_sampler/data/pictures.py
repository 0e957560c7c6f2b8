"""Pictures of any kind as RGB of 8 bits: the one reader behind training data and images to start from.

transparency     on white
16 bits          scaled to 8
floats           0 to 1; anything else is an error
32-bit integers  refused: nothing says what white is
animations       the first frame
rotation         as the EXIF block says, if it can be read
"""

from __future__ import annotations

import io
import math
import os
import threading
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .reports import printable

__all__ = ["MAX_PIXELS", "SUFFIXES", "check_floats", "fit_image", "pixel_limit", "read_picture", "to_rgb"]

# fmt: off
SUFFIXES = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff",
    ".jp2", ".ppm", ".pgm", ".pbm", ".pnm",
))
# fmt: on
# Not all that Pillow has: an EPS by another name would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM")
MAX_PIXELS = "MOE_SAMPLER_MAX_PIXELS"
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OPENING = threading.Lock()


def pixel_limit(max_pixels: int | None = None) -> float:
    """How many pixels a picture may have: what is given, else the environment variable
    MOE_SAMPLER_MAX_PIXELS, else Pillow's `Image.MAX_IMAGE_PIXELS` (89 million; None there is no limit).

    Raises:
        ValueError: not a positive whole number.
    """
    given = os.environ.get(MAX_PIXELS) if max_pixels is None else max_pixels
    if given is None or given == "":
        with _OPENING:
            return math.inf if Image.MAX_IMAGE_PIXELS is None else Image.MAX_IMAGE_PIXELS
    try:
        number = int(given)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or isinstance(given, bool | float):
        name = MAX_PIXELS if max_pixels is None else "max_pixels"
        raise ValueError(f"{name} must be a positive whole number, got {given!r}")
    return number


def read_picture(
    file: str | os.PathLike[str] | bytes, name: str | None = None, max_pixels: int | None = None
) -> Image.Image:
    """RGB, as large as it is in the file.

    Args:
        file: a path, or a file's bytes.
        name: what errors call it; by default the path.
        max_pixels: see `pixel_limit`; compared with the header before anything is decoded.

    Raises:
        ValueError: not a picture, damaged, cut off, too large, or of values without a meaning; it names it.
    """
    name = printable(("image" if isinstance(file, bytes) else os.fspath(file)) if name is None else name)
    limit = pixel_limit(max_pixels)
    if not isinstance(file, bytes):
        file = Path(file)
        if file.exists() and not file.is_file():
            raise ValueError(f"{name} cannot be read as an image: it is not a file")
    try:
        with _open(file) as opened:
            _check_size(opened, name, limit)
            if opened.format == "PNG":
                # Decoding takes no notice of the checksums.
                with _open(file) as checked:
                    checked.verify()
            return _rgb(opened, name)
    except _Refused:
        raise
    except Exception as error:  # decoders of damaged bytes raise almost anything
        raise ValueError(f"{name} cannot be read as an image: {_reason(error)}") from None


def to_rgb(image: Image.Image, name: str = "image", max_pixels: int | None = None) -> Image.Image:
    """A copy as `read_picture` would give it, of a picture that Pillow has opened or made.

    Raises:
        ValueError: as `read_picture`.
    """
    limit = pixel_limit(max_pixels)
    try:
        _check_size(image, name, limit)
        return _rgb(image, name)
    except _Refused:
        raise
    except Exception as error:  # Pillow decodes only here
        raise ValueError(f"{name} cannot be read as an image: {_reason(error)}") from None


def fit_image(image: Image.Image, height: int, width: int) -> Image.Image:
    """Exactly this size, in the image's own mode: resized to cover it, then cut at the centre; never
    squashed."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def check_floats(values: np.ndarray, name: str) -> np.ndarray:
    """float32, from 0 (black) to 1 (white).

    Raises:
        ValueError: something isn't finite, or lies outside.
    """
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise _Refused(f"{name} holds NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    # Room for the rounding of whoever scaled them.
    if low < -1e-5 or high > 1 + 1e-5:
        raise _Refused(
            f"{name} holds floats from {low:g} to {high:g}; they must lie between 0 (black) and 1 (white). "
            "Scale them, or give those from 0 to 255 as uint8"
        )
    return values.clip(0, 1)


class _Refused(ValueError):
    """An error that already says whose it is."""


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no picture of a format that is read ({', '.join(sorted(SUFFIXES))})"
    return text or type(error).__name__


def _open(file: Path | bytes) -> Image.Image:
    # `_check_size` follows, with the caller's limit; Pillow's would warn or stop here, whatever that is.
    with _OPENING:
        kept, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = kept


def _check_size(image: Image.Image, name: str, limit: float) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise _Refused(f"{name} is empty: {width} × {height} pixels")
    if width * height > limit:
        raise _Refused(
            f"{name} has {width} × {height} pixels, and the limit is {limit:,.0f}: make it smaller, or raise "
            f"the limit by max_pixels or the environment variable {MAX_PIXELS}"
        )


def _rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    kind = image.format
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image, kind, name)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image.convert("RGB")
    rgb.info = {}  # so that nobody turns it again
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # a broken block, which says nothing about the pixels
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image, kind: str | None, name: str) -> Image.Image:
    """Grey values of more than 8 bits, as L."""
    values = np.asarray(image)
    if image.mode == "F":
        return Image.fromarray((check_floats(values, name) * 255).round().astype(np.uint8))
    if image.mode == "I" and kind != "PPM":  # Pillow scales PGM's to 16 bits
        raise _Refused(
            f"{name} has 32-bit integers, and nothing says which of them is white: save it with 8 or 16 bits"
        )
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey)
