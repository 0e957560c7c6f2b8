"""What commands that make images have in common: prompts, seeds, and numbered files, with traces and
animations if wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .._numbers import whole
from ..pipelines.choices import MAX_IMAGES, MAX_PROMPT
from .options import OutputOptions
from .settings import merged

if TYPE_CHECKING:
    from ..sampling.plan import SamplingPlan

__all__ = ["Pictures"]

_MAX_ZOOM = 64


class Pictures:
    """The images a command makes: what is wrong with them shows before any work.

    Args:
        prompts: as given; without any, that of the image before.
        options: how many, and where to.
        previous: the settings of an image made before, or {}.

    Attributes:
        settings: seed and zoom, to be written into the images.
    """

    def __init__(
        self, prompts: Sequence[str] | None, options: OutputOptions, previous: Mapping[str, Any]
    ) -> None:
        self.prompts = list(prompts or ([previous["prompt"]] if "prompt" in previous else []))
        if not self.prompts:
            nothing = ", which this image has none of" if options.like else ", or --like IMAGE"
            raise ValueError("give a prompt" + nothing)
        for prompt in self.prompts:
            if len(prompt) > MAX_PROMPT or "\0" in prompt:
                what = "a NUL" if "\0" in prompt else f"{len(prompt):,} characters, more than {MAX_PROMPT:,}"
                raise ValueError(f"a prompt has {what}: it is no text that an image can be described by")
        most = MAX_IMAGES // len(self.prompts)
        whole("images per prompt", options.images, most)
        self.settings = {"seed": 0} | merged(previous, {"seed": options.seed, "zoom": options.zoom})
        whole("zoom", self.settings.get("zoom", 1), _MAX_ZOOM)
        self._each, self._count = options.images, len(self.prompts) * options.images
        self._latents = options.output.suffix == ".safetensors"
        self._watched = options.trace or options.animate
        if self._latents and self._watched:
            raise ValueError("--trace and --animate go with images: give a name that ends in .png")
        self.quiet = options.quiet
        self._files = _Files(options.output, self._count, options.trace, options.animate, options.quiet)

    def make(
        self,
        pipe: Any,
        plan: SamplingPlan,
        call: Mapping[str, Any],
        batch_size: int | None,
        record: Mapping[str, Any],
    ) -> None:
        """Call the pipeline and write what it makes, each batch as it ends, with `record` in the metadata.

        plan: the one that the pipeline runs for this call.
        """
        longest = {**record, "prompt": max(self.prompts, key=len), "seed": 0}
        self._files.check_room(longest, plan)
        if self.quiet:
            pipe.set_progress_bar_config(disable=True)
        watch = _Watch(self._count, batch_size) if self._watched else None

        def take(index: int, image: Any) -> None:
            own = {"prompt": self.prompts[index // self._each], "seed": self.settings["seed"] + index}
            self._files.write(pipe, plan, image, index, {**record, **own}, watch)

        from ..pipelines.finished import as_finished

        as_finished(
            pipe,
            len(plan),
            take,
            output_type="latent" if self._latents else "pil",
            watch=watch,
            watched=() if watch is None else watch.tensor_inputs,
            prompt=self.prompts,
            num_images_per_prompt=self._each,
            batch_size=batch_size,
            **call,
        )


class _Watch:
    """A trace for every batch. A batch goes through a stage of the plan before the next one does, so a step
    is told once by each, in their order."""

    def __init__(self, images: int, batch_size: int | None) -> None:
        from ..viewing.trace import Trace

        self._size = batch_size or images
        self._traces = [Trace() for _ in range(0, images, self._size)]
        self._told: Counter[int] = Counter()

    @property
    def tensor_inputs(self) -> list[str]:
        """What it looks at."""
        return list(self._traces[0].tensor_inputs)

    def __call__(self, pipe: Any, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        trace = self._traces[self._told[step]]
        self._told[step] += 1
        trace(pipe, step, timestep, tensors)

    def of(self, index: int) -> tuple[Any, int]:
        """An image's trace, and its place in it."""
        return self._traces[index // self._size], index % self._size


class _Files:
    """What will be written, checked now: one name as it is given, several numbered from 1."""

    def __init__(self, output: Path, count: int, trace: bool, animate: bool, quiet: bool = False) -> None:
        from ..viewing.images import check_image_name, check_writable

        self._quiet = quiet
        if animate and output.suffix.lower() == ".webp":
            raise ValueError(f"--animate writes {output}: give the image another ending, .png or .jpg")
        stems = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i + 1}") for i in range(count)]
        self.paths = stems
        self.sheets = [path.with_suffix(".trace.png") for path in stems] if trace else []
        self.animations = [path.with_suffix(".webp") for path in stems] if animate else []
        for path in self.paths + self.sheets:
            if output.suffix == ".safetensors":
                check_writable(path, ".safetensors")
            else:
                check_image_name(path)
        for path in self.animations:
            check_writable(path, ".webp")

    def check_room(self, record: Mapping[str, Any], plan: SamplingPlan) -> None:
        """Whether the images' format holds these settings."""
        from .. import __version__
        from ..viewing.images import check_room
        from ..viewing.parameters import parameters_text

        own = {**record, "version": __version__, "zoom": 1}
        check_room(self.paths[0], own, parameters_text(own, plan, (1024, 1024)))

    def _say(self, path: Path) -> None:
        if not self._quiet:
            typer.echo(str(path))

    def write(
        self,
        pipe: Any,
        plan: SamplingPlan,
        made: Any,
        index: int,
        record: dict[str, Any],
        watch: _Watch | None,
    ) -> None:
        from .. import __version__
        from ..viewing.images import save_image, save_latents, save_png, zoom_factor
        from ..viewing.images import zoom as enlarge
        from ..viewing.parameters import parameters_text

        path = self.paths[index]
        record["version"] = __version__
        if path.suffix == ".safetensors":
            save_latents(made[None], path, record)
            self._say(path)
            return
        record["zoom"] = record.get("zoom") or zoom_factor(made.size)
        parameters = parameters_text(record, plan, made.size)
        save_image(enlarge(made, record["zoom"]), path, record, parameters)
        self._say(path)
        if watch is None:
            return
        trace, place = watch.of(index)
        title = f'"{record["prompt"]}", seed {record["seed"]}'
        if self.sheets:
            save_png(trace.sheet(pipe, plan, place, title=title), self.sheets[index], record)
            self._say(self.sheets[index])
        if self.animations:
            trace.animation(pipe, plan, place, title=title).save(self.animations[index])
            self._say(self.animations[index])
