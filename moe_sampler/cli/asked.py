"""What the options of `generate` ask for: the model, its runs' settings and plans, from configs alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sampling.reuse import AUTO
from .by_name import ByExpert, over_previous
from .imports import import_pipelines
from .like import check_places, read_like
from .loras import Lora, read_loras
from .machine import Machine
from .models import Model
from .options import OutputOptions, PipelineOptions, RunOptions, SizeOptions
from .plans import find_plan
from .settings import borrowing, call_of, compile_plan, merge_runs, merged, planned_experts, reusing

if TYPE_CHECKING:
    from ..sampling.plan import SamplingPlan

__all__ = ["Asked", "Compiled", "read_previous", "start_image"]


@dataclass(frozen=True)
class Compiled:
    """A run: its plan, what the pipeline is called with for it, and what an image remembers of it."""

    plan: SamplingPlan
    call: dict[str, Any]
    record: dict[str, Any]


def read_previous(out: OutputOptions, where: PipelineOptions, begin: Any) -> dict[str, Any]:
    """The settings of the image that --like names, checked; {} without one."""
    previous = read_like(out)
    if "student" in previous:
        raise ValueError(f"{out.like} was made by a student: use `moe-sampler tinyflux sample --like`")
    check_places(out, previous, where, begin)
    return previous


@dataclass(frozen=True)
class Asked:
    """Everything that a run's own settings don't change.

    Args:
        previous: settings of an image made before, without what a given plan decides.
        plan: that was brought along.
        model, configs, defaults: which experts, how they were trained, and their default settings.
        loras, text_encoder: adapters.
        computer: what computes.
    """

    previous: Mapping[str, Any]
    plan: SamplingPlan | None
    model: Model
    configs: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    loras: list[Lora]
    text_encoder: bool | None
    computer: Machine

    @classmethod
    def read(
        cls,
        previous: Mapping[str, Any],
        plan: Path | None,
        strength: float | None,
        run: RunOptions,
        where: PipelineOptions,
    ) -> Asked:
        """From the options.

        Raises:
            ValueError: what is wrong with them; no weights are read.
        """
        given = find_plan(plan, previous, run)
        if given is not None:
            if strength is not None:
                raise ValueError("a plan decides which steps are run: leave out --strength")
            from ..pipelines.recorded import without_plan

            previous = without_plan(previous)
        model = Model.read(where, previous)
        configs, defaults = model.training()
        loras, text_encoder = read_loras(previous, where, list(configs))
        return cls(
            previous, given, model, configs, defaults, loras, text_encoder, Machine.read(where, previous)
        )

    @property
    def names(self) -> list[str]:
        """Of the experts."""
        return list(self.configs)

    def settings(
        self, previous: Mapping[str, Any], run: RunOptions, size: SizeOptions, strength: float | None
    ) -> dict[str, Any]:
        """What is asked for, over `previous` settings."""
        settings = {} if self.plan is not None else self._reusing(merge_runs(previous, run, self.names))
        settings |= merged(previous, {"height": size.height, "width": size.width, "strength": strength})
        negative = ByExpert.read("--negative", size.negative, known=self.names)
        return settings | over_previous(previous, self.names, negative_prompt=negative)

    def _reusing(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings with the reuse of the speed that is asked for; an image that remembers none was made
        without."""
        if self.computer.speed == "none" or settings.keys() & {"reuse", "budget"}:
            return settings
        return settings | {"reuse": AUTO if self.computer.chosen else 1}

    def compiled(self, settings: dict[str, Any], *, image: bool) -> Compiled:
        """The run of these settings. image: whether it starts from one."""
        from ..pipelines.recorded import plan_settings, record_defaults, reuse_in_full

        if self.loras:
            settings = settings | {"loras": [[each.expert, each.path, each.scale] for each in self.loras]}
            settings |= {} if self.text_encoder is None else {"lora_text_encoder": self.text_encoder}
        if self.plan is not None:
            from ..pipelines.settings import given_plan

            settings = {name: value for name, value in settings.items() if name != "strength"}
            given_plan(self.plan, planned_experts(self.configs, self.defaults, {}), image=image)
            call = call_of(settings, self.names) | {"plan": self.plan}
            return Compiled(self.plan, call, settings | plan_settings(self.plan))
        call = call_of(settings, self.names)
        plan = compile_plan(self.configs, self.defaults, call, self.model.reuse_shares)
        record = record_defaults(reuse_in_full(settings, plan, self.names), self.defaults, self.names)
        return Compiled(plan, call, record)

    def import_for_plan(self, settings: Mapping[str, Any]) -> None:
        """The pipelines, if the plan of these settings needs some of diffusers: that alone would import more
        than the run has a use for."""
        call = call_of(settings, self.names)
        experts = planned_experts(self.configs, self.defaults, call)
        borrows = borrowing(experts)
        if self.plan is None and (borrows or reusing(experts, call)):
            self.import_pipelines(borrows=borrows)

    def import_pipelines(self, *, borrows: bool = False) -> None:
        """What the run needs. borrows: whether solvers that are diffusers' are yet to be made."""
        import_pipelines(loras=bool(self.loras), compiles=self.computer.speed == "max", borrows=borrows)

    @property
    def of_all(self) -> dict[str, Any]:
        """What every image remembers."""
        return dict(self.model.settings) | self.computer.settings

    def load(self) -> Any:
        """The pipeline."""
        return self.model.load(self.computer, self.loras, self.text_encoder)


def start_image(settings: dict[str, Any], previous: Mapping[str, Any], image: Path | None) -> Any:
    """The PIL image to start from, its place noted in `settings`."""
    from ..data.digests import content
    from ..data.pictures import read_picture
    from ..pipelines.checks import check_strength

    kept = image is None and previous.get("image") is not None
    path = Path(previous["image"]) if kept else image
    if path is None:
        check_strength(settings.get("strength"), None, None)
        return None
    opened, digest = read_picture(path), content(path)
    if kept and digest != previous["image_sha256"]:
        raise ValueError(f"{path} is no longer the image that was started from: give --image")
    settings |= {"image": str(path.resolve()), "image_sha256": digest}
    settings["strength"] = check_strength(settings.get("strength"), opened, None)
    return opened
