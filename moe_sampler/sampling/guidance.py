"""Classifier-free guidance where a plan's row can't hold it: the models' conditioning, guiders, rescaling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch

from moe_sampler.kernels import projected_guidance, zero_star_guidance

from .guiders import Guider
from .plan import ExpertCall, SamplingPlan

__all__ = ["Conditioning", "GuidanceInputs", "GuidedOutputs", "rescaled_guidance"]

Conditioning: TypeAlias = Mapping[str, torch.Tensor] | Mapping[str, Mapping[str, torch.Tensor]]
"""Keyword arguments for the models, tensors with the batch first; or those of each expert, by its name."""


def _by_expert(
    kind: str, given: Conditioning, experts: Iterable[str], needed: Iterable[str]
) -> dict[str, Mapping[str, torch.Tensor]]:
    """The keyword arguments of each needed expert."""
    own = {name: value for name, value in given.items() if isinstance(value, Mapping)}
    shared = {name: value for name, value in given.items() if not isinstance(value, Mapping)}
    if not own:
        return dict.fromkeys(needed, shared)
    if shared:
        raise ValueError(
            f"{kind} mixes tensors and mappings: give either keyword arguments for all experts, or a mapping "
            f"of them for each, by name"
        )
    for name in given:
        if name not in experts:
            raise ValueError(f"{kind} names {name!r}, but the experts are {', '.join(map(repr, experts))}")
    for name in needed:
        if name not in given:
            raise ValueError(f"{kind} has nothing for expert {name!r}: give its keyword arguments, or {{}}")
    return {name: own[name] for name in needed}


class GuidanceInputs:
    """The models' keyword arguments for guided and unguided calls, checked.

    Args:
        plan: decides who is called and who is guided.
        experts: names that conditioning may use; experts that the plan doesn't call may be among them.
        batch: of the latents.
        cond, uncond: see `Conditioning`; each may be shared or by expert. Guided experts need both.

    Raises:
        ValueError: what is missing, superfluous or misshapen.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        experts: Iterable[str],
        batch: int,
        cond: Conditioning | None,
        uncond: Conditioning | None,
    ) -> None:
        guided = [
            n for n in plan.experts if any(c.guided and c.name == n for s in plan.steps for c in s.calls)
        ]
        if guided and uncond is None:
            raise ValueError("the plan uses classifier-free guidance: give `uncond` beside `cond`")
        self._cond = _by_expert("cond", cond or {}, experts, plan.experts)
        self._uncond = _by_expert("uncond", uncond or {}, experts, guided)
        for kind, given in (("cond", self._cond), ("uncond", self._uncond)):
            for values in given.values():
                for key, value in values.items():
                    if value.shape[0] != batch:
                        raise ValueError(
                            f"{kind}[{key!r}] has batch {value.shape[0]}, the latents have {batch}"
                        )
        for name in guided:
            cond, uncond = self._cond[name], self._uncond[name]
            if set(cond) != set(uncond):
                raise ValueError(
                    f"cond and uncond must have the same keys, got {sorted(cond)} and {sorted(uncond)}"
                )
            for key in cond:
                if cond[key].shape != uncond[key].shape:
                    raise ValueError(
                        f"cond[{key!r}] and uncond[{key!r}] must have one shape, got {list(cond[key].shape)} "
                        f"and {list(uncond[key].shape)}"
                    )

    def of(self, calls: Iterable[ExpertCall]) -> dict[tuple[str, bool], dict[str, torch.Tensor]]:
        """What to pass for (expert, guided?), joined once for all calls: uncond first, as in diffusers."""
        joined: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        result: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
        for name, guided in dict.fromkeys((call.name, call.guided) for call in calls):
            cond = self._cond[name]
            if not guided:
                result[name, False] = dict(cond)
                continue
            uncond = self._uncond[name]
            pair = (id(cond), id(uncond))  # experts that share their conditioning share its copy
            if pair not in joined:
                joined[pair] = {key: torch.cat([uncond[key], value]) for key, value in cond.items()}
            result[name, True] = joined[pair]
        return result


def _std(x: torch.Tensor) -> torch.Tensor:
    """[B, ...] -> [B, 1, ...] float64: each sample's standard deviation, the same alone and in any batch.

    A reduction may add up in another order in another batch, so each sample gets one of its own.
    """
    each = [sample.double().std() for sample in x]
    return torch.stack(each).view(-1, *[1] * (x.ndim - 1))


def rescaled_guidance(guided: torch.Tensor, cond: torch.Tensor, rescale: float) -> torch.Tensor:
    """Guidance whose standard deviation, sample by sample, is pulled back to the conditional prediction's.

    rescale * guided * std(cond) / std(guided) + (1 - rescale) * guided (arXiv:2305.08891, section 3.4, eq. 15
    and 16). Nothing is read back from the device.

    Args:
        guided: [B, ...] float32.
        cond: [B, ...], as a model returns it.
        rescale: phi in [0, 1].

    Returns:
        [B, ...] float32.
    """
    deviation = _std(guided)
    # A constant prediction has nothing to rescale.
    factor = torch.where(deviation > 0, _std(cond) / deviation, 1.0)
    return guided * (rescale * factor + (1.0 - rescale)).float()


class GuidedOutputs:
    """What the rows read of guided calls, with what guiders remember from one of an expert's calls to the
    next: a run's own, and nothing after a step in which the expert wasn't guided."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[int, torch.Tensor]] = {}

    def of(self, call: ExpertCall, output: torch.Tensor, x: torch.Tensor, index: int) -> torch.Tensor:
        """[B, ...] float32 with its guidance in it, or the model's output itself, [B or 2B, ...], where the
        row has the guidance.

        Args:
            output: of the model.
            x: [B, ...] float32, the state.
            index: the step.
        """
        output = output.contiguous()
        if not (call.guider or call.guidance_rescale):
            return output
        scale, cond = call.guidance_scale, output[len(x) :]
        if call.guider is None:
            uncond = output[: len(x)].float()
            guided = uncond + scale * (cond.float() - uncond)
        elif call.guider.kind == "cfg_zero_star":
            guided = zero_star_guidance(output, scale)
        else:
            guided = self._projected(call, call.guider, output, x, index)
        return rescaled_guidance(guided, cond, call.guidance_rescale) if call.guidance_rescale else guided

    def _projected(
        self, call: ExpertCall, guider: Guider, output: torch.Tensor, x: torch.Tensor, index: int
    ) -> torch.Tensor:
        momentum, running = guider.momentum, None
        if momentum:
            last, kept = self._running.get(call.name, (-1, None))
            running = torch.empty_like(x) if kept is None else kept
            momentum = momentum if kept is not None and last == index - 1 else 0.0
            self._running[call.name] = index, running
        return projected_guidance(
            output,
            x,
            *call.to_x0,
            call.guidance_scale,
            eta=guider.eta,
            norm_threshold=guider.norm_threshold,
            running=running,
            momentum=momentum,
        )
