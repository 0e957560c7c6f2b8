"""Pictures, folders and tars to be read."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


def saved(image: Image.Image, kind: str = "PNG", **save) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **save)
    return buffer.getvalue()


def png(colour=RED, size=(8, 6), mode="RGB", **save) -> bytes:
    return saved(Image.new(mode, size, colour), **save)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(values: np.ndarray, colour: int, transparent: bytes | None = None) -> bytes:
    """A 16-bit PNG of [H, W, channels]; colour: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def write_tar(path: Path, files: dict[str, bytes | str | tuple[bytes, str]]) -> Path:
    """A pair is a link: its type, and where to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                member.type, member.linkname = data
                archive.addfile(member)
                continue
            data = data.encode() if isinstance(data, str) else data
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def shown(source) -> list[tuple[str, str, tuple[int, int, int]]]:
    return [
        (key, caption, image.getpixel((0, 0)))
        for key, image, caption in (source[i] for i in range(len(source)))
    ]


def captions(source) -> dict[str, str]:
    return {source[i].key: source[i].caption for i in range(len(source))}
