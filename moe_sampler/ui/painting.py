"""The models of a page, and the runs on them: one at a time, in steps that can be watched and stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.loras import read_loras
from ..cli.machine import Machine
from ..cli.models import student_place
from ..cli.settings import call_of
from .form import Wrong
from .planning import Cast
from .previews import Preview, Watch
from .telling import Stop, told

if TYPE_CHECKING:
    from PIL import Image

    from ..sampling.plan import SamplingPlan

__all__ = ["Painter", "Picture", "Preview", "Said"]

Tell = Callable[[Any], None]


@dataclass(frozen=True)
class Said:
    """What is going on, in words."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A run's end, or of a comparison what there is by now.

    Args:
        image: as it is shown and kept.
        settings: that it was made with; None where it isn't finished.
        seen: what was believed on the way.
    """

    image: Image.Image
    settings: dict[str, Any] | None
    seen: tuple[Preview, ...] = ()


class Painter:
    """Runs what a page asks for; who comes while another's run goes on, waits.

    The models are loaded when they are first needed, and again for another speed.
    """

    def __init__(self, cast: Cast) -> None:
        self.cast = cast
        self.loras = read_loras({}, cast.where, cast.form.names)
        self._turn = threading.Lock()
        self._loaded: tuple[Machine, Any] | None = None
        self._students: dict[bool, Any] = {}

    def machine(self, settings: Mapping[str, Any]) -> Machine:
        """What computes, at the speed that is wanted."""
        own = dataclasses.replace(self.cast.where, speed=settings.get("speed", "none"))
        return Machine.read(own, {})

    def warm(self) -> None:
        """Load the experts before anybody asks, in a thread of its own; what goes wrong is told who asks."""

        def load() -> None:
            with self._turn, contextlib.suppress(Exception):
                self._experts({"speed": self.cast.where.speed or "none"}, lambda _: None)

        threading.Thread(target=load, daemon=True).start()

    def picture(
        self, settings: Mapping[str, Any], plan: SamplingPlan, stop: Stop
    ) -> Iterator[Said | Preview | Picture]:
        """Paint one. Nothing more comes after `stop` was set.

        Args:
            settings, plan: from `Cast.settings`.
            stop: ends the run at its next step.

        Raises:
            Wrong: before any work.
        """
        start = self._start(settings)
        sizes = self._sizes(settings, start)
        settings = {**settings, **sizes}

        def work(tell: Tell) -> None:
            from ..pipelines.finished import as_finished

            with self._turn:
                if stop.is_set():
                    return
                student = "student" in settings
                pipe = self._student(settings, tell) if student else self._experts(settings, tell)
                watch, made = Watch(plan, tell, stop), []
                call: dict[str, Any] = {} if student else {"image": start}
                call |= self._call(settings)
                as_finished(
                    pipe,
                    len(plan),
                    lambda _, image: made.append(image),
                    watch=watch,
                    watched=watch.tensor_inputs,
                    prompt=[settings["prompt"]],
                    **call,
                )
            if made and not stop.is_set():
                tell(self._finished(made[0], settings, tuple(watch.seen)))

        return told(work, stop)

    def comparison(self, settings: Mapping[str, Any], stop: Stop) -> Iterator[Said | Picture]:
        """Each expert alone, a naive handoff and the hybrid, as `moe-sampler compare` makes them; the sheet
        after each.

        Raises:
            Wrong: before any work.
        """
        if "image" in settings:
            raise Wrong("image", "a comparison starts from noise: take the picture away")
        if settings.get("reuse", 1) != 1:
            raise Wrong("reuse", "a comparison takes full passes: give 1")
        for name, levels in settings.get("levels", {}).items():
            if isinstance(levels, list):
                raise Wrong(
                    f"levels_{name}", "a comparison takes a spacing by its name, not a list of levels"
                )
        steps = settings["num_inference_steps"]
        total = sum(steps.values()) if isinstance(steps, Mapping) else steps
        left = ("prompt", "seed", "speed", "reuse")
        own = {key: value for key, value in settings.items() if key not in left}
        own |= {"num_inference_steps": total}
        self._sizes(own, None)
        machine = self.machine(settings)
        asked = {"prompts": [settings["prompt"]], "seeds": [settings["seed"]]}
        record = self.cast.record(own) | machine.settings | asked

        def work(tell: Tell) -> None:
            from ..pipelines.compare import Comparison, compare

            def show(so_far: Comparison) -> None:
                if stop.is_set():
                    raise _Stopped
                done = sum(image is not None for (image,) in so_far.images)
                tell(Picture(so_far.sheet(), record if done == len(so_far.images) else None))
                if done < len(so_far.images):
                    tell(Said(f"{so_far.titles[done]}, {done + 1} of {len(so_far.titles)}"))

            with self._turn:
                if stop.is_set():
                    return
                pipe = self._experts(settings, tell)
                tell(Said("Comparing, 1 of 4"))
                call = call_of(own, self.cast.form.names)
                try:
                    compare(pipe, asked["prompts"], asked["seeds"], on_batch_end=show, **call)
                except _Stopped:
                    return

        return told(work, stop)

    def _start(self, settings: Mapping[str, Any]) -> Image.Image | None:
        from ..data.pictures import read_picture

        if "image" not in settings:
            return None
        try:
            return read_picture(Path(settings["image"]))
        except (OSError, ValueError) as error:
            raise Wrong("image", str(error)) from None

    def _sizes(self, settings: Mapping[str, Any], start: Any) -> dict[str, int]:
        try:
            return self.cast.model.size(dict(settings), start)
        except ValueError as error:
            side = next((side for side in ("height", "width") if str(error).startswith(side)), "height")
            raise Wrong(side, str(error)) from None

    def _call(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        if "student" in settings:
            from ..cli.student_sample import STUDENT_CALL

            return {key: settings[key] for key in STUDENT_CALL if key in settings}
        return call_of(settings, self.cast.form.names)

    def _finished(self, image: Image.Image, settings: dict[str, Any], seen: tuple[Preview, ...]) -> Picture:
        from .. import __version__
        from ..viewing.images import zoom, zoom_factor

        factor = zoom_factor(image.size)
        record = self.cast.record(settings) | self.machine(settings).settings | {"zoom": factor}
        loras, text_encoder = self.loras
        if loras and "student" not in settings:
            record |= {"loras": [[each.expert, each.path, each.scale] for each in loras]}
            record |= {} if text_encoder is None else {"lora_text_encoder": text_encoder}
        return Picture(zoom(image, factor), record | {"version": __version__}, seen)

    def _experts(self, settings: Mapping[str, Any], tell: Tell) -> Any:
        machine = self.machine(settings)
        if self._loaded is None or self._loaded[0] != machine:
            tell(Said("Loading the experts"))
            self._loaded = None
            self._students.pop(True, None)
            gc.collect()
            pipe = self.cast.model.load(machine, *self.loras)
            pipe.set_progress_bar_config(disable=True)
            self._loaded = machine, pipe
        return self._loaded[1]

    def _student(self, settings: Mapping[str, Any], tell: Tell) -> Any:
        guided = any(f"{name}_weight" in settings for name in self.cast.form.names)
        pipe = self._experts(settings, tell) if guided else None
        if guided not in self._students:
            from moe_sampler.tinyflux.sampling.pipeline import StudentPipeline

            tell(Said("Loading the student"))
            machine = self.machine(settings)
            made = StudentPipeline.from_pretrained(
                student_place(self.cast.student or ""),
                pipe,
                **self.cast.student_encoders(guided),
                dtype=machine.torch_dtype,
                device=machine.device,
                local_files_only=self.cast.where.local_files_only,
            )
            made.set_progress_bar_config(disable=True)
            self._students[guided] = made
        return self._students[guided]


class _Stopped(Exception):
    pass
