"""What experts train on: images as latents, encoded once, and their captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from .._protocols import implements
from .._transfers import OnDevice
from ..data.captions import check_text
from ..data.pictures import fit_image, to_rgb
from ..data.samples import CaptionedImage, Source
from ..errors import CheckpointError
from ..loading.fingerprint import fingerprint
from ..pipelines.latents import encode_images
from ..training.checkpoints import write_tensors
from ..training.settings import SettingsError
from .captions import Captions

__all__ = ["DrawnSource", "LatentImages", "encode_source", "left_to_train"]

RESIDENT_BYTES = 2**31
"""Latents that take no more are kept on the device."""
DRAWN_CAPTIONS = 8
"""Texts of an image whose source can say the same in other words."""


class DrawnSource(Source, Protocol):
    """A source that can say the same in other words, and draw the same masses without texture."""

    def caption(self, index: int, generator: np.random.Generator) -> str: ...

    def structure(self, index: int) -> Image.Image: ...


class LatentImages(Dataset):
    """Latents by index, with the texts that describe them.

    Args:
        latents: float32 [N, C, h, w], scaled.
        captions: of the N images: a text each, or as many texts of every image.
        about: plain values that say which data these are.
        structure: float32 [N, C, h, w], of the same images' structure pictures, or None.
        names: of the images, for messages; or None.
    """

    def __init__(
        self,
        latents: Tensor,
        captions: Captions | Sequence[Sequence[str] | str],
        about: Mapping[str, Any],
        structure: Tensor | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if latents.ndim != 4 or latents.dtype != torch.float32 or not len(latents):
            raise ValueError(
                f"latents must be float32 [N, C, h, w], got {latents.dtype} {list(latents.shape)}"
            )
        if structure is not None and structure.shape != latents.shape:
            raise ValueError(
                f"structure must have the latents' shape {list(latents.shape)}, got {list(structure.shape)}"
            )
        if len(captions) != len(latents):
            raise ValueError(f"{len(latents)} latents need as many captions, got {len(captions)}")
        self.latents, self.structure, self.about = latents, structure, dict(about)
        self.captions = captions if isinstance(captions, Captions) else Captions.of(captions)
        self.names = names
        self._tables = {"latents": OnDevice(latents)}
        if structure is not None:
            self._tables["structure"] = OnDevice(structure)
        # What is small is brought to the device as a whole, and batches are gathered there.
        size = latents.numel() * latents.element_size() * len(self._tables)
        self._resident = size <= RESIDENT_BYTES

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index, "latents": self.latents[index]}
        return found if self.structure is None else {**found, "structure": self.structure[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch: index: int64 [B], and what `tensors` doesn't find on the device."""
        index = torch.tensor(indices)
        if self._resident:
            return {"index": index}
        found = {"index": index, "latents": self.latents[index]}
        return found if self.structure is None else {**found, "structure": self.structure[index]}

    def tensors(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """A batch's latents and structure pictures' latents, on its device."""
        index = batch["index"]
        found = {
            name: batch[name] if name in batch else table.on(index.device)[index]
            for name, table in self._tables.items()
        }
        return found["latents"], found.get("structure")

    def split(self, held_out: int) -> tuple[LatentImages, LatentImages | None]:
        """(All but the last `held_out`, those, or None if there are to be none).

        Raises:
            SettingsError: nothing would be left to train on.
        """
        kept = left_to_train(len(self), held_out)
        return self._part(0, kept), self._part(kept, len(self)) if held_out else None

    def _part(self, first: int, last: int) -> LatentImages:
        structure = None if self.structure is None else self.structure[first:last]
        about = {**self.about, "images": last - first}
        names = None if self.names is None else self.names[first:last]
        captions = self.captions.part(first, last)
        return LatentImages(self.latents[first:last], captions, about, structure, names)


def left_to_train(images: int, held_out: int) -> int:
    """How many.

    Raises:
        SettingsError: none.
    """
    if held_out >= images:
        raise SettingsError(
            f"of {images} images {held_out} are held out, and none is left to train on: lower held_out"
        )
    return images - held_out


def encode_source(
    source: Source,
    vae: Any,
    folder: Path,
    *,
    height: int,
    width: int,
    structure: bool = False,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatentImages:
    """Encode all images, or read what an earlier run with the same data and VAE left in `folder`.

    Args:
        source: images and captions.
        vae: of diffusers; scaled latents as `encode_images` makes them.
        folder: for `latents-<fingerprint>.safetensors`. The first of several processes encodes.
        height, width: of the images, in pixels; they are resized and cut.
        structure: also encode the structure pictures.
        batch_size: images encoded together.
        progress: called with (images done, images in all).

    Raises:
        SettingsError: structure pictures of a source that has none, or a size the VAE can't have.
    """
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    if height < scale or width < scale or height % scale or width % scale:
        raise SettingsError(f"height and width must be multiples of the VAE's {scale}, got {height}×{width}")
    if structure and not implements(source, DrawnSource):
        raise SettingsError(
            "structure_below needs structure pictures, which these data don't have: leave it out"
        )
    about = {
        **source.describe(),
        "images": len(source),
        "size": [height, width],
        "structure": structure,
        "captions": DRAWN_CAPTIONS if implements(source, DrawnSource) else 1,
        "vae": fingerprint(vae),
    }
    stored = {**about, "format": 3}
    digest = hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder) / f"latents-{digest}.safetensors"
    state = PartialState()
    with state.local_main_process_first():
        if not path.is_file():
            vae.to(state.device)
            found = _encode(source, vae, (height, width), structure, batch_size, progress)
            write_tensors(path, found, {"sha256": _sum(found)})
    read = _read(path)
    captions, names = (_unpacked(read[name]) for name in ("captions", "names"))
    return LatentImages(read["latents"], captions, about, read.get("structure"), names)


def _encode(
    source: Source,
    vae: Any,
    size: tuple[int, int],
    structure: bool,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    latents, flat = [], []
    captions: list[list[str]] = []
    names: list[str] = []
    for start in range(0, len(source), batch_size):
        indices = range(start, min(start + batch_size, len(source)))
        images: list[CaptionedImage] = [source[i] for i in indices]
        for i, image in zip(indices, images, strict=True):
            check_text(image.caption, f"the caption of {image.key}")
            captions.append([image.caption, *_other_words(source, i)])
            names.append(image.key)
        fitted = [fit_image(to_rgb(image.image, image.key), *size) for image in images]
        latents.append(encode_images(vae, fitted).cpu())
        if structure and implements(source, DrawnSource):
            flat.append(encode_images(vae, [fit_image(source.structure(i), *size) for i in indices]).cpu())
        progress(indices.stop, len(source))
    found = {"latents": torch.cat(latents), "captions": _packed(captions), "names": _packed(names)}
    return {**found, "structure": torch.cat(flat)} if structure else found


def _other_words(source: Source, index: int) -> list[str]:
    """More texts of an image, the same every time."""
    if not implements(source, DrawnSource):
        return []
    return [source.caption(index, np.random.default_rng([index, k])) for k in range(1, DRAWN_CAPTIONS)]


def _packed(texts: list[Any]) -> Tensor:
    return torch.from_numpy(np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8).copy())


def _unpacked(tensor: Tensor) -> list[Any]:
    return json.loads(tensor.numpy().tobytes())


def _read(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError: not as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            wanted = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): delete it, and it is made again") from None
    if _sum(read) != wanted:
        raise CheckpointError(f"{path} is damaged (its SHA-256 differs): delete it, and it is made again")
    return read


def _sum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
