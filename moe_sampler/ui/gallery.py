"""The pictures a visitor has made: files that carry their settings, in a folder whose name only the visitor's
browser knows."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.digests import cache_home
from ..viewing.images import read_settings, save_png

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Gallery", "default_folder"]

_NAME = re.compile(r"[0-9a-f]{32}")
_MOST = 200


def default_folder() -> Path:
    """Below the user's cache folder."""
    return cache_home() / "moe-sampler" / "gallery"


class Gallery:
    """Pictures by visitor.

    Args:
        folder: of all visitors' folders.
        most: pictures of each; then the oldest make room.
    """

    def __init__(self, folder: Path, most: int = _MOST) -> None:
        self.folder, self._most = folder, most
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def visitor(self, told: Any = None) -> str:
        """A visitor's name: what the browser remembers, if it is one, else a new one."""
        known = isinstance(told, str) and _NAME.fullmatch(told) is not None
        return told if known else secrets.token_hex(16)

    def pictures(self, visitor: str) -> list[Path]:
        """Newest first."""
        return sorted(self._own(visitor).glob("*.png"), reverse=True)

    def keep(
        self, visitor: str, image: Image.Image, settings: Mapping[str, Any], parameters: str = ""
    ) -> Path:
        """Write a picture with its settings, and for other programs its `parameters_text`, as
        `moe-sampler generate` does."""
        own = self._own(visitor)
        own.mkdir(exist_ok=True, mode=0o700)
        # Names in the order of time; nanoseconds, as several may be made in a second.
        path = own / f"{time.time_ns():020}.png"
        save_png(image, path, settings, parameters)
        for old in self.pictures(visitor)[self._most :]:
            old.unlink(missing_ok=True)
        return path

    def keep_start(self, visitor: str, uploaded: Path, digest: str) -> Path:
        """A copy of a picture to start from, which the browser's upload is not there for long."""
        starts = self._own(visitor) / "starts"
        starts.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = starts / f"{digest[:32]}{uploaded.suffix.lower()}"
        if not path.exists() and uploaded != path:
            shutil.copyfile(uploaded, path)
        return path

    def settings(self, visitor: str, path: Path) -> dict[str, Any]:
        """What a picture was made with.

        Raises:
            ValueError: it is none of the visitor's.
        """
        if path.parent != self._own(visitor):
            raise ValueError(f"{path.name} is no picture of this gallery")
        return read_settings(path)

    def remove(self, visitor: str, path: Path) -> None:
        """Delete a picture of the visitor's."""
        if path.parent == self._own(visitor) and path.suffix == ".png":
            path.unlink(missing_ok=True)

    def _own(self, visitor: str) -> Path:
        if _NAME.fullmatch(visitor) is None:
            raise ValueError("no visitor of this page")
        return self.folder / visitor
