"""From what the fields say to settings and a plan, without any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..cli.models import Model, recorded_student, student_place
from ..cli.options import EncoderOptions, PipelineOptions
from ..cli.settings import call_of, compile_plan, planned_experts
from ..pipelines.recorded import record_defaults, stepping_in_full
from .form import STUDENT, Form, Wrong

if TYPE_CHECKING:
    from ..sampling.plan import SamplingPlan

__all__ = ["Cast"]

_PLANNED = ("handoff", "steps", "solver", "levels", "guidance", "weight", "reuse", "strength")
"""Fields that a plan is made of begin with these."""


@dataclass(frozen=True)
class Cast:
    """Who paints on a page, as their configs say it.

    Args:
        where: which model, and what computes.
        student: a TinyFlux, if there is one.
        encoders: the student's.
    """

    where: PipelineOptions = field(default_factory=PipelineOptions)
    student: str | None = None
    encoders: EncoderOptions = field(default_factory=EncoderOptions)

    @cached_property
    def model(self) -> Model:
        return Model.read(self.where, {})

    @cached_property
    def training(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Scheduler configs by expert, and the default settings.

        Raises:
            ValueError: no such model.
        """
        configs, defaults = self.model.training()
        if self.student is not None:
            from moe_sampler.tinyflux.sampling.guided import GUIDANCE_SCALE

            defaults = {**defaults, f"{STUDENT}_guidance": GUIDANCE_SCALE}
        return configs, defaults

    @cached_property
    def form(self) -> Form:
        configs, defaults = self.training
        speed = {"speed": self.where.speed or "none"}
        return Form(tuple(configs), {**defaults, **speed}, self.student is not None)

    @cached_property
    def own_solvers(self) -> dict[str, str]:
        """What each expert steps with where nothing else is chosen."""
        return {e.name: str(e.solver) for e in planned_experts(*self.training, {})} | {STUDENT: "euler"}

    @cached_property
    def student_config(self) -> Any:
        """The student's own, without its weights."""
        from moe_sampler.tinyflux.model.loading import load_config

        return load_config(student_place(self.student or ""), local_files_only=self.where.local_files_only)

    def student_encoders(self, guided: bool) -> dict[str, Any]:
        """Keywords of `StudentPipeline.from_pretrained`: what the student sees and reads with."""
        given = {key: value for key, value in vars(self.encoders).items() if value is not None}
        model = self.model
        named = (
            self.student_config.encoders is not None
            and not model.settings.get("model")
            and model.preset is None
        )
        return given if given or guided or named else {"encoders": model.shared}

    def settings(
        self, values: Mapping[str, Any], *, prompted: bool = True
    ) -> tuple[dict[str, Any], SamplingPlan]:
        """What the fields say, and its plan.

        Raises:
            Wrong: with the field that is to blame.
        """
        settings = self._settings(values, prompted)
        try:
            return settings, self.plan(settings)
        except ValueError as error:
            raise Wrong(self._to_blame(values), str(error)) from None

    def _settings(self, values: Mapping[str, Any], prompted: bool) -> dict[str, Any]:
        settings = self.form.settings(values, prompted=prompted)
        if values["maker"] == STUDENT:
            settings |= {
                "student": recorded_student(self.student or ""),
                "upstream_schedule": self.student_config.schedule == "data",
            }
        return settings

    def plan(self, settings: Mapping[str, Any]) -> SamplingPlan:
        """The plan that a run of these settings follows.

        Raises:
            ValueError: settings that there is no plan for.
        """
        configs, defaults = self.training
        if "student" in settings:
            from ..cli.student_sample import STUDENT_CALL, checked_plan

            call = {key: settings[key] for key in STUDENT_CALL if key in settings}
            guided = any(f"{name}_weight" in settings for name in configs)
            return checked_plan(None, call, *(self.training if guided else ({}, {})))
        return compile_plan(configs, defaults, call_of(settings, list(configs)), self.model.reuse_shares)

    def _to_blame(self, values: Mapping[str, Any]) -> str:
        """The field that must only be as at first for there to be a plan."""
        first = self.form.first
        for name in sorted(self.form.shown(values["maker"]), key=lambda name: (name == "steps", name)):
            if name.startswith(_PLANNED) and values[name] != first[name]:
                try:
                    self.plan(self._settings({**values, name: first[name]}, False))
                except ValueError:
                    continue
                return name
        return ""

    def record(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings with what they leave to the model spelled out, as a picture remembers them."""
        configs, defaults = self.training
        if "student" not in settings:
            found = record_defaults(settings, defaults, list(configs))
        elif any(f"{name}_weight" in settings for name in configs):
            found = dict(settings) | stepping_in_full(settings, defaults, (STUDENT, *configs))
        else:
            found = dict(settings)
        return found | dict(self.model.settings)
