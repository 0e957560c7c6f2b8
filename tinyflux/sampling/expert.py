"""The student as an expert: sampled by the same plan and fused step as Sol and Lune, alone or with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from moe_sampler import Expert, FlowPath
from moe_sampler._numbers import number
from moe_sampler.tinyflux.model.tinyflux import TinyFlux
from moe_sampler.tinyflux.sampling.reuse import check_reusable, recording_model, reuse_share, reusing_model

__all__ = ["STUDENT", "StudentModel", "tinyflux_expert"]

STUDENT = "tinyflux"
"""The student's name among experts."""

Features = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


class StudentModel:
    """A student that eats latents, as a sampler's experts do, and a `sampling.reuse.ReusableModel`.

    Args:
        model: the student.
        features: what the experts say of a noisy latent. `features(sample, t)`, with sample [B, C, H, W] and
            t [], returns any of lune_features, sol_stats and sol_spatial, as `TinyFlux.forward` takes them.
            Without it the student predicts them.
    """

    def __init__(self, model: TinyFlux, features: Features | None = None) -> None:
        self.model, self.features = model, features

    def __call__(self, sample: Tensor, timestep: Tensor, **conditioning: Tensor) -> Tensor:
        """data - noise, [B, C, H, W] in the model's dtype.

        sample: [B, C, H, W] of any float dtype. timestep: t, 0 at noise and 1 at data, [] or [B].
        conditioning: encoder_hidden_states, pooled_projections, and what else `TinyFlux.forward` takes.
        """
        return self._call(self.model, sample, timestep, conditioning)

    def _call(
        self, model: TinyFlux, sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        _, channels, height, width = sample.shape
        given = {} if self.features is None else self.features(sample, timestep)
        tokens = sample.flatten(2).transpose(1, 2)
        size = (height, width)
        (velocity,) = model(tokens, timestep=timestep, size=size, return_dict=False, **conditioning, **given)
        return velocity.transpose(1, 2).reshape(-1, channels, height, width)

    def check_reusable(self) -> None:
        """Raise ValueError, with what to do, for a student whose features can't be reused."""
        check_reusable(self.model)

    def recording(self, sample: Tensor, timestep: Tensor, **conditioning: Tensor) -> tuple[Tensor, Tensor]:
        """As a call, and what the middle blocks added to the tokens, [B, L + N, D]."""
        recording, last = recording_model(self.model)
        output = self._call(recording, sample, timestep, conditioning)
        assert last.features is not None  # the call left them there
        return output, last.features

    def reusing(self, sample: Tensor, timestep: Tensor, features: Tensor, **conditioning: Tensor) -> Tensor:
        """As a call, computed in the first and the last block alone."""
        return self._call(reusing_model(self.model, features), sample, timestep, conditioning)


def tinyflux_expert(
    model: TinyFlux | None,
    *,
    name: str = STUDENT,
    features: Features | None = None,
    upstream_schedule: bool | None = None,
    **settings: Any,
) -> Expert:
    """The student as an `Expert` for `moe_sampler.plan` and `moe_sampler.sample`.

    Its conditioning has `encoder_hidden_states` and `pooled_projections`; for guidance
    `model.null_condition(batch, length)` is the unconditional one. To share a run with Sol and Lune it must
    have their latents' channels.

    Args:
        model: the student; None for planning alone.
        name: of the expert.
        features: real features of the experts at every step, see `StudentModel`.
        upstream_schedule: sample where upstream does, t' = k·t / (1 + (k - 1)·t), which crowds the steps near
            the data. Without it the shift acts on s = 1 - t, as everywhere here, and crowds them near the
            noise. By default as the student's config says.
        settings: of `Expert`: `shift` (k, 3 by default), `guidance_scale`, `solver` ("euler" by default) ...

    Raises:
        TypeError: model isn't a TinyFlux.
        ValueError: a setting out of range.
    """
    if not isinstance(model, TinyFlux | None):
        raise TypeError(f"model must be a TinyFlux, got {type(model).__name__}")
    settings = {"solver": "euler", "shift": 3.0, **settings}
    if model is not None:
        settings = {"dtype": model.dtype, **settings}
    if model is not None and settings.get("reuse") is not None:
        check_reusable(model)
        settings = {"reuse_share": reuse_share(model.config), **settings}
    if upstream_schedule is None:
        upstream_schedule = model is not None and model.config["schedule"] == "data"
    if upstream_schedule:
        shift = number("shift", settings["shift"])
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        # The map of shift k on t is the map of shift 1/k on 1 - t.
        settings["shift"] = 1.0 / shift
    path = FlowPath(timestep_scale=1.0, data_at_one=True)
    works = None if model is None else StudentModel(model, features)
    return Expert(name, path, "reversed_flow_prediction", works, **settings)
