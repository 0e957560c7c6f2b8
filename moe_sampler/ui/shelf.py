"""Pictures on their way to browsers, as whole files.

Gradio writes a picture that it is given as such anew for every visitor, over a file that another's browser
may be reading; files it copies, and well.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .._files import write_whole

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Shelf"]

_FORMATS = {"png": {}, "webp": {"quality": 90, "method": 2}}


class Shelf:
    """A folder of the latest pictures, by their content; gone with the process.

    Args:
        most: pictures it holds; Gradio has a copy of those before.
    """

    def __init__(self, most: int = 256) -> None:
        self._folder = TemporaryDirectory(prefix="moe-sampler-", ignore_cleanup_errors=True)
        self._most, self._latest, self._turn = most, OrderedDict[Path, None](), threading.Lock()

    def put(self, image: Image.Image, kind: str = "png") -> str:
        """The path of the picture's file, .png or .webp."""
        encoded = io.BytesIO()
        image.save(encoded, format=kind, **_FORMATS[kind])
        name = hashlib.sha256(encoded.getvalue()).hexdigest()
        path = Path(self._folder.name) / f"{name[:32]}.{kind}"
        with self._turn:
            if path not in self._latest:
                write_whole(path, lambda file: file.write_bytes(encoded.getvalue()))
            self._latest[path] = None
            self._latest.move_to_end(path)
            while len(self._latest) > self._most:
                self._latest.popitem(last=False)[0].unlink(missing_ok=True)
        return str(path)
