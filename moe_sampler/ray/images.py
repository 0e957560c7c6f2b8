"""Images for a data set of prompts."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import local_place
from ..pipelines.choices import PICTURE_FORMATS, any_of, check_choice
from .batches import check_columns, column_of, default_device, plain

if TYPE_CHECKING:
    from ..loading.presets import ExpertSource
    from ..sampling.plan import SamplingPlan

__all__ = ["GenerateImages"]

_NOT_OF_ROWS = {"self", "prompt", "seed", "generator", "latents", "output_type", "return_dict", "batch_size"}
_NOT_OF_ROWS |= {"num_images_per_prompt", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
_NOT_OF_ROWS |= {"prompt_embeds", "negative_prompt_embeds"}


class GenerateImages:
    """A `HybridPipeline` for Ray Data: one a worker, kept between batches::

        dataset.map_batches(
            GenerateImages,
            fn_constructor_args=("owner/name",),
            compute=ray.data.ActorPoolStrategy(size=2),
            num_gpus=1,
        )

    A row's image depends on its prompt, seed and settings; a model may round differently in another batch, so
    for the same bits on any cluster give `batch_size=1` here (not to `map_batches`).

    Args:
        model: folder or hub id, as `HybridPipeline.from_pretrained` takes it; None is the demo's experts.
        columns: columns that are arguments of the pipeline's call, by the same names: "handoff",
            "negative_prompt" ... What is null in a row is left out there.
        settings: the same for all rows; a row's own come first.
        prompt_column, seed_column: where prompts and seeds are. Every row needs both.
        image_format: "png", "jpg" or "webp": files' bytes, as parquet and WebDataset have them, with their
            settings and A1111's parameters in the metadata, as `moe-sampler generate` writes them; "array":
            uint8 [H, W, 3], as `Dataset.write_images` takes them.
        batch_size: images sampled at once; by default all rows of a batch with the same settings.
        loading: other arguments of `from_pretrained`: preset, experts, dtype, offload, device ...

    Raises:
        ValueError: a column or setting that isn't one of the pipeline's.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        columns: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        prompt_column: str = "prompt",
        seed_column: str = "seed",
        image_format: str = "png",
        batch_size: int | None = None,
        **loading: Any,
    ) -> None:
        check_choice("image format", image_format, (*PICTURE_FORMATS, "array"))
        self._columns, self._settings = tuple(columns), dict(settings or {})
        self._prompt, self._seed = prompt_column, seed_column
        self._format, self._batch_size = image_format, batch_size
        from ..pipelines.hybrid import HybridPipeline
        from ..pipelines.settings import default_settings

        known = inspect.signature(HybridPipeline.__call__).parameters.keys() - _NOT_OF_ROWS
        unknown = [name for name in (*self._columns, *self._settings) if name not in known]
        if unknown:
            raise ValueError(f'"{unknown[0]}" is no setting of a row: use {any_of(sorted(known))}')
        self._of_all = _model_settings(model, loading)
        if model is None and "preset" not in loading:
            from ..demo import experts_path

            model = experts_path()
        self._pipe = pipe = HybridPipeline.from_pretrained(model, **{"device": default_device(), **loading})
        pipe.set_progress_bar_config(disable=True)
        self._defaults = default_settings(pipe.expert_names, pipe.config)
        self._of_all["dtype"] = str(pipe.expert_unet(pipe.expert_names[0]).dtype).removeprefix("torch.")

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with two more columns: `image`, and `error`, null where there is none. A row that can't
        be made has no image: null, or one of 0 × 0.

        batch: arrays or lists of one length, by column.

        Raises:
            ValueError: columns that aren't there.
        """
        wanted = (self._prompt, self._seed, *self._columns)
        check_columns(batch, wanted, self._seed)
        count = len(batch[self._prompt])
        images: list[Any] = [None] * count
        errors: list[str | None] = [None] * count
        groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
        for i in range(count):
            own = {name: plain(batch[name][i]) for name in self._columns}
            call = self._settings | {name: value for name, value in own.items() if value is not None}
            groups.setdefault(json.dumps(call, default=repr, sort_keys=True), (call, []))[1].append(i)
        for call, indices in groups.values():
            self._make(batch, call, indices, images, errors)
        return {**batch, "image": self._column(images), "error": column_of(errors)}

    def _make(
        self,
        batch: Mapping[str, Any],
        call: Mapping[str, Any],
        indices: Sequence[int],
        images: list[Any],
        errors: list[str | None],
    ) -> None:
        from ..pipelines.recorded import recorded_call
        from ..rows.making import each_that_can

        def attempt(some: Sequence[int]) -> None:
            prompts = [plain(batch[self._prompt][i]) for i in some]
            seeds = [plain(batch[self._seed][i]) for i in some]
            made = self._pipe(prompts, seed=seeds, batch_size=self._batch_size, **call)
            record = recorded_call(call, made.plan, self._defaults, self._pipe.expert_names)
            for i, prompt, seed, image in zip(some, prompts, seeds, made.images, strict=True):
                own = {**record, **self._of_all, "prompt": prompt, "seed": seed, "zoom": 1}
                images[i] = self._encoded(image, own, made.plan)

        def failed(i: int, reason: str) -> None:
            errors[i] = reason

        each_that_can(indices, len(indices), attempt, failed)

    def _encoded(self, image: Any, settings: dict[str, Any], plan: SamplingPlan) -> Any:
        if self._format == "array":
            return np.asarray(image.convert("RGB"))
        from .. import __version__
        from ..viewing.images import encoded_image
        from ..viewing.parameters import parameters_text

        settings = {**settings, "version": __version__}
        parameters = parameters_text(settings, plan, image.size)
        return encoded_image(image, f"picture.{self._format}", settings, parameters)

    def _column(self, images: Sequence[Any]) -> Any:
        if self._format == "array":
            images = [np.zeros((0, 0, 3), np.uint8) if image is None else image for image in images]
            if len({image.shape for image in images}) == 1:
                return np.stack(images)
        return column_of(images)


def _model_settings(model: str | Path | None, loading: Mapping[str, Any]) -> dict[str, Any]:
    """Which model, as pictures remember it."""
    from ..loading.presets import TRAINING, ExpertSource

    named = {name: loading.get(name) for name in TRAINING} | dict(loading.get("experts") or {})
    found = {key: loading[key] for key in ("preset", "revision", "subfolder", "variant") if loading.get(key)}
    if loading.get("speed", "none") != "none":
        found["speed"] = loading["speed"]
    sources = {name: _source(ExpertSource.of(source)) for name, source in named.items() if source is not None}
    found |= {"sources": sources} if sources else {}
    return {"model": None if model is None else local_place(str(model))} | found


def _source(source: ExpertSource) -> dict[str, Any]:
    own = {"training": source.training, "revision": source.revision, "subfolder": source.subfolder}
    given = {name: value for name, value in own.items() if value is not None}
    return {"weights": local_place(str(source.weights)), **given}
