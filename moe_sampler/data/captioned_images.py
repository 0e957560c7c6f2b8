"""Images with captions: a folder, WebDataset tars, or the demo's drawn scenes, all read by index."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["CaptionedImage", "DemoScenes", "ImageFolder", "Source", "TarFiles", "fit_image", "open_source"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA = "metadata.jsonl"


class CaptionedImage(NamedTuple):
    """key: what errors call it. image: RGB, as large as it came. caption: may be empty."""

    key: str
    image: Image.Image
    caption: str


class Source(Protocol):
    """Any sequence of captioned images; implement it to bring your own."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CaptionedImage:
        """The same image and caption every time."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON that changes when the data do: kind, and a fingerprint where there are files."""
        ...


def fit_image(image: Image.Image, height: int, width: int) -> Image.Image:
    """RGB of exactly this size: resized to cover it, then cut at the centre; never squashed."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _read_image(file: Path | io.BytesIO, name: str) -> Image.Image:
    """RGB, turned as its EXIF data say; what is transparent becomes white."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from None


def _read_text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _fingerprint(rows: Iterator[tuple[str, int, str]]) -> str:
    """SHA-256 of (key, bytes of the image file, caption) of all samples in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


class ImageFolder:
    """A folder of images, also in subfolders, whose captions are either

    - in `metadata.jsonl`, as `datasets`' ImageFolder reads it: {"file_name": "a.png", "text": "a castle"} a
      line, in the order of its lines, every image named once; or
    - beside each image, in a .txt file of the same name; in the order of the images' names.

    Raises:
        ValueError: an image without caption, a caption without image, or no image at all.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder")
        files = sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.suffix.lower() in IMAGES and path.is_file() and not path.name.startswith(".")
        )
        if not files:
            raise ValueError(f"{self.folder} has no images ({', '.join(IMAGES)})")
        metadata = self.folder / METADATA
        self._samples = self._listed(metadata, files) if metadata.is_file() else self._sidecars(files)

    def _listed(self, metadata: Path, files: list[str]) -> list[tuple[str, str]]:
        samples: list[tuple[str, str]] = []
        # Not splitlines: JSON may hold other line separators within a text.
        for number, line in enumerate(_read_text(metadata.read_bytes(), str(metadata)).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, text = row["file_name"], row["text"]
                if not isinstance(name, str) or not isinstance(text, str):
                    raise TypeError("file_name and text must be strings")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{metadata}:{number} must be like {{"file_name": "a.png", "text": "..."}}: {error!r}'
                ) from None
            samples.append((PurePosixPath(name).as_posix(), text.strip()))
        names = [name for name, _ in samples]
        absent, left = sorted(set(names) - set(files)), sorted(set(files) - set(names))
        if absent:
            raise ValueError(f"{metadata} names {_some(absent)}, which {self.folder} doesn't have")
        if left:
            raise ValueError(f"{metadata} doesn't name {_some(left)}: add captions or remove the images")
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"{metadata} names {_some(twice)} more than once")
        return samples

    def _sidecars(self, files: list[str]) -> list[tuple[str, str]]:
        texts = {name: (self.folder / name).with_suffix(".txt") for name in files}
        bare = [name for name, text in texts.items() if not text.is_file()]
        if bare:
            raise ValueError(
                f"{_some(bare)} in {self.folder} have no caption: write it to a .txt file of the same name, "
                f"or all captions to {METADATA}"
            )
        if len(set(texts.values())) < len(files):
            raise ValueError(f"{self.folder} has images that share a caption file: their names must differ")
        return [(name, _read_text(text.read_bytes(), str(text)).strip()) for name, text in texts.items()]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> CaptionedImage:
        name, caption = self._samples[index]
        path = self.folder / name
        return CaptionedImage(name, _read_image(path, str(path)), caption)

    def describe(self) -> dict[str, Any]:
        rows = ((name, (self.folder / name).stat().st_size, text) for name, text in self._samples)
        return {"kind": "folder", "fingerprint": _fingerprint(rows)}


class _TarSample(NamedTuple):
    tar: int
    key: str
    image: str
    image_at: tuple[int, int]
    text_at: tuple[int, int]


class TarFiles:
    """WebDataset tars, uncompressed: files of one name up to its first dot are a sample, KEY.jpg and KEY.txt.

    Args:
        tars: the files, or a folder of `.tar` files, read in the order of their names. Other members of a
            sample are left alone.

    Raises:
        ValueError: no tars, unreadable ones, or a sample without exactly one image and one .txt.
    """

    def __init__(self, tars: str | Path | Sequence[str | Path]) -> None:
        if isinstance(tars, (str, Path)):
            path = Path(tars)
            self.tars = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        else:
            self.tars = [Path(tar) for tar in tars]
        if not self.tars:
            raise ValueError(f"{tars} has no .tar files")
        self._samples = [sample for i, tar in enumerate(self.tars) for sample in self._index(i, tar)]
        if not self._samples:
            raise ValueError(f"{_some([str(tar) for tar in self.tars])}: no samples in there")

    @staticmethod
    def _index(number: int, tar: Path) -> list[_TarSample]:
        found: dict[str, dict[str, list[tarfile.TarInfo]]] = {}
        try:
            size = tar.stat().st_size
            with tarfile.open(tar, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} is cut off")
                    folder, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    kind = "text" if extension.lower() == "txt" else "image"
                    if kind == "text" or f".{extension.lower()}" in IMAGES:
                        kinds = found.setdefault(f"{folder}/{stem}" if folder else stem, {})
                        kinds.setdefault(kind, []).append(member)
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"{tar} cannot be read as an uncompressed tar: {error}") from None
        samples = []
        for key, kinds in found.items():
            counts = {kind: len(kinds.get(kind, ())) for kind in ("image", "text")}
            if set(counts.values()) != {1}:
                raise ValueError(
                    f"{tar}: {key} has {counts['image']} images and {counts['text']} .txt captions; a sample "
                    "has one of each"
                )
            image, text = kinds["image"][0], kinds["text"][0]
            places = [(member.offset_data, member.size) for member in (image, text)]
            samples.append(_TarSample(number, key, image.name, *places))
        return samples

    def __len__(self) -> int:
        return len(self._samples)

    def _read(self, sample: _TarSample, place: tuple[int, int]) -> bytes:
        with open(self.tars[sample.tar], "rb") as file:
            file.seek(place[0])
            return file.read(place[1])

    def _caption(self, sample: _TarSample) -> str:
        name = f"{self.tars[sample.tar]}: {sample.key}.txt"
        return _read_text(self._read(sample, sample.text_at), name).strip()

    def __getitem__(self, index: int) -> CaptionedImage:
        sample = self._samples[index]
        name = f"{self.tars[sample.tar]}: {sample.image}"
        image = _read_image(io.BytesIO(self._read(sample, sample.image_at)), name)
        return CaptionedImage(sample.key, image, self._caption(sample))

    def describe(self) -> dict[str, Any]:
        rows = ((sample.key, sample.image_at[1], self._caption(sample)) for sample in self._samples)
        return {"kind": "webdataset", "fingerprint": _fingerprint(rows)}


class DemoScenes:
    """`count` of the demo's procedurally drawn scenes with captions, from seed `first`."""

    def __init__(self, count: int, first: int = 0) -> None:
        if count < 1 or first < 0:
            raise ValueError(f"count must be at least 1 and first at least 0, got {count} and {first}")
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> CaptionedImage:
        seed = self._seed(index)
        # Streams 0 to 2 of a scene's seed draw it.
        text = self.caption(index, np.random.default_rng([seed, 3]))
        return CaptionedImage(f"scene {seed}", self._draw(seed), text)

    def caption(self, index: int, generator: np.random.Generator) -> str:
        """Another caption of the same scene, in the generator's words."""
        from ..demo.captions import caption
        from ..demo.scenes import draw_scene

        return caption(draw_scene(self._seed(index)), generator)

    def structure(self, index: int) -> Image.Image:
        """The scene's flat masses, without texture."""
        return self._draw(self._seed(index), structure=True)

    def _seed(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.first + index

    def _draw(self, seed: int, structure: bool = False) -> Image.Image:
        from ..demo.scenes import draw_scene, render

        return Image.fromarray(render(draw_scene(seed), structure))

    def describe(self) -> dict[str, Any]:
        return {"kind": "demo scenes", "first": self.first}


def open_source(path: str | Path) -> Source:
    """An ImageFolder, or TarFiles where `path` is a .tar or a folder that has some and no images."""
    path = Path(path)
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        if path.is_dir() and any(child.suffix.lower() in IMAGES for child in path.iterdir()):
            raise ValueError(f"{path} has both images and .tar files: keep them in folders of their own")
        return TarFiles(path)
    return ImageFolder(path)
