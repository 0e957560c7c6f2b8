"""What a cache holds, for a data set of images and captions that somebody else reads and writes: Ray Data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_sampler import __version__
from moe_sampler._numbers import whole
from moe_sampler.data.cells import CAPTIONS, IMAGES, cell_picture
from moe_sampler.data.samples import CaptionedImage
from moe_sampler.demo import experts_path
from moe_sampler.loading.hub import Hub
from moe_sampler.pipelines.choices import CONVENTIONS, Convention, check_choice
from moe_sampler.pipelines.hybrid import HybridPipeline
from moe_sampler.ray.batches import check_columns, column_of, default_device, plain
from moe_sampler.tinyflux.features.block_maps import BlockMaps
from moe_sampler.tinyflux.features.cache_format import SCHEMA, sample_shapes
from moe_sampler.tinyflux.features.encoders import StudentEncoders
from moe_sampler.tinyflux.features.extraction import T_BUCKETS
from moe_sampler.tinyflux.features.sample_features import SampleFeatures, sample_settings
from moe_sampler.tinyflux.features.teachers import Teachers, image_side

__all__ = ["MADE", "ExtractFeatures"]

MADE = "made"
"""The column that says how a row was made, the same in all of them."""


class ExtractFeatures:
    """What `build_cache` makes of images and captions, for Ray Data: one set of models a worker, kept between
    batches::

        dataset.map_batches(
            ExtractFeatures,
            fn_constructor_args=("owner/name",),
            compute=ray.data.ActorPoolStrategy(size=2),
            num_gpus=1,
        )

    A row's features depend on its image, caption, seed and settings; a model may round differently in another
    batch, so for the same bits on any cluster give `micro_batch=1`. A sample of `build_cache` has the seed
    `seed + i`. `import_rows` makes a cache of the rows.

    Args:
        model: folder or hub id of the experts, as `HybridPipeline.from_pretrained` takes it; None is the
            demo's.
        teachers: "sol", "lune" or both; by default those that the model has, and () is no features.
        height, width: pixels images are resized and cut to; by default what the experts were made for.
        t_buckets: increasing times at which features are taken; 0 is noise, 1 is data.
        convention: how features are extracted, as `ExpertFeatures` takes it.
        map_times, map_block, map_expert: for maps of a block at these times, as `BlockMaps` has them.
        dtype: "float16" or "float32", of latents, text states and Lune's features.
        encoders, vae, clip, t5, t5_length: the student's, as `StudentEncoders.gather` takes them.
        image_column, caption_column: by default the first of the usual names.
        seed_column: every row needs a seed.
        mask_column: of masks, null where all of an image counts.
        micro_batch: rows computed together, from a batch's first one on.
        loading: other arguments of `from_pretrained`: preset, experts, device, torch_dtype ... By default
            the models are float16 on CUDA, and float32 elsewhere.

    Raises:
        ValueError: settings that make no sense.
        CheckpointError: models that can't be loaded.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        teachers: Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        t_buckets: Sequence[float] = T_BUCKETS,
        convention: Convention = CONVENTIONS[0],
        map_times: Sequence[float] | None = None,
        map_block: str | None = None,
        map_expert: str = "lune",
        dtype: str = "float16",
        encoders: str | None = None,
        vae: str | None = None,
        clip: str | None = None,
        t5: str | None = None,
        t5_length: int | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        seed_column: str = "seed",
        mask_column: str | None = None,
        micro_batch: int = 8,
        **loading: Any,
    ) -> None:
        check_choice("dtype", dtype, ("float16", "float32"))  # what NumPy and parquet have
        self._micro_batch = whole("micro_batch", micro_batch, 10**6)
        self._image, self._caption = image_column, caption_column
        self._seed, self._mask = seed_column, mask_column
        if model is None and "preset" not in loading:
            model = experts_path()
        device = loading.setdefault("device", default_device())
        loading.setdefault("torch_dtype", "float16" if str(device).startswith("cuda") else "float32")
        pipe = HybridPipeline.from_pretrained(model, **loading)
        given = {"encoders": encoders, "vae": vae, "clip": clip, "t5": t5, "t5_length": t5_length}
        places: dict[str, Any] = {name: loading.get(name) for name in ("cache_dir", "token")}
        hub = Hub(local_files_only=loading.get("local_files_only", False), **places)
        student = StudentEncoders.gather(pipe, **given, device=device, hub=hub)
        teaching = None
        if teachers is None or len(teachers):
            maps: dict[str, Any] = {}
            if map_times is not None:
                found = BlockMaps.from_pipeline(pipe, map_expert, map_block)
                maps = {"maps": found, "map_times": map_times}
            teaching = Teachers.from_pipeline(pipe, teachers, convention=convention, **maps)
        side = image_side(pipe)
        height, width = side if height is None else height, side if width is None else width
        if height is None or width is None:
            raise ValueError("nothing says how large the images are: give height and width")
        settings = sample_settings(student, teaching, height, width, t_buckets, dtype)
        self._made = {
            "schema": SCHEMA,
            "version": __version__,
            "settings": settings | {"micro_batch": micro_batch},
            "encoders": student.describe(),
            "experts": None if teaching is None else teaching.describe(),
        }
        self._make = SampleFeatures(student, teaching, settings)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch without its images and masks, and with a column for each tensor of `TENSORS`, float or
        bool or uint8 [rows, ...]; `caption`; and `made`, JSON that says how.

        batch: images as files' bytes, as pixels, uint8 [H, W, 3], or as `datasets` has them.

        Raises:
            ValueError: columns that aren't there, an image that can't be read, features that aren't finite.
        """
        image = self._image or next((name for name in IMAGES if name in batch), IMAGES[0])
        caption = self._caption or next((name for name in CAPTIONS if name in batch), CAPTIONS[0])
        masks = () if self._mask is None else (self._mask,)
        check_columns(batch, (image, caption, self._seed, *masks), self._seed)
        rows = range(len(batch[image]))
        parts = []
        for first in rows[:: self._micro_batch]:
            some = rows[first : first + self._micro_batch]
            samples = [self._sample(batch, image, caption, i) for i in some]
            seeds = [whole("seed", plain(batch[self._seed][i]), 2**62, 0) for i in some]
            own = None if self._mask is None else [self._mask_of(batch[self._mask][i]) for i in some]
            parts.append(self._make(samples, seeds, own))
        captions = [text for part in parts for text in part.pop("captions")]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        kept = {name: values for name, values in batch.items() if name not in (image, *masks)}
        return (
            kept
            | {name: _array(tensor) for name, tensor in tensors.items()}
            | {
                "caption": column_of(captions),
                MADE: column_of([self._how(tensors)] * len(captions)),
            }
        )

    def _sample(self, batch: Mapping[str, Any], image: str, caption: str, index: int) -> CaptionedImage:
        key = f"the row with seed {plain(batch[self._seed][index])}"
        text = plain(batch[caption][index])
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{key}: {caption} holds no text, but {type(text).__name__}")
        picture = cell_picture(batch[image][index], f"{key}: {image}")
        return self._make.fitted(CaptionedImage(key, picture, (text or "").strip()))

    def _mask_of(self, value: Any) -> Any:
        return None if value is None else cell_picture(value, str(self._mask)).convert("L")

    def _how(self, tensors: Mapping[str, Tensor]) -> str:
        return json.dumps({**self._made, "shapes": sample_shapes(tensors)}, sort_keys=True)


def _array(tensor: Tensor) -> Any:
    return tensor.contiguous().numpy()
