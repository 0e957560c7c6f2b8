"""The loop: call the model, launch one fused kernel, repeat. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from moe_sampler.kernels import sampler_step_
from moe_sampler.kernels.noise import seeds_tensor

from .experts import Expert
from .features import KeptFeatures
from .finite import FiniteWatch
from .guidance import Conditioning, GuidanceInputs, GuidedOutputs
from .initial import check_state, initial_latents
from .inputs import Inputs, NoiseAhead, timesteps_of
from .plan import ExpertCall, PlanStep, SamplingPlan
from .stretches import MovingTable, RecordableModel, Recording, steps_alike, take_step, turns_memories

__all__ = ["SamplingRun", "sample"]

Callback = Callable[[dict[str, Any]], torch.Tensor | None]


class SamplingRun:
    """One batch on its way through a plan; it may pause between any two steps.

    Several runs may thus share a device that holds one model at a time: advance each to the handoff, swap the
    models, advance each to the end. The result is the same to the last bit as without the pause.

    Args: as `sample` takes them. Everything is checked here; device memory beyond the state is only used
        from the first `advance` on, and between two calls of it the models' inputs are given up again.
        keep_x0: whether the callback reads `x0`; a step that need not keep it takes fewer passes.

    Attributes:
        plan: what is run.
        index: the plan step to be run next; `len(plan)` when the run is done.
        x: [B, ...] float32, the state, updated in place.
        x0: [B, ...] float32, the last step's prediction, or None before the first step and where nothing
            needs it (no solver that remembers it, no callback).
        interrupted: set it to True, from a callback or from anywhere, and no more models are called; set it
            back to False to go on.
    """

    @torch.no_grad()
    def __init__(
        self,
        plan: SamplingPlan,
        experts: Expert | Iterable[Expert],
        x: torch.Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        seeds: Sequence[int] | torch.Tensor | None = None,
        noise: Callable[[int], torch.Tensor] | None = None,
        cond: Conditioning | None = None,
        uncond: Conditioning | None = None,
        device: torch.device | str = "cpu",
        callback: Callback | None = None,
        keep_x0: bool = True,
    ) -> None:
        plan.check()
        self.plan, self.index, self.interrupted = plan, 0, False
        self.x0: torch.Tensor | None = None
        self._experts = {e.name: e for e in ([experts] if isinstance(experts, Expert) else experts)}
        self._models = {e.name: e.model for e in self._experts.values() if e.model is not None}
        for name in plan.experts:
            if name not in self._models:
                raise ValueError(f"the plan calls expert {name!r}: pass it to sample() with its model")
        if x is not None:
            check_state(x)
            self.x = x.clone(memory_format=torch.contiguous_format)
        elif shape is not None and seeds is not None:
            self.x = initial_latents(plan, shape, seeds, device)
        else:
            raise ValueError("give either x, or shape and seeds")
        batch = self.x.shape[0]
        if plan.needs_noise and seeds is None and noise is None:
            raise ValueError("the plan adds fresh noise: give seeds (one a sample) or a noise function")
        if seeds is not None and len(seeds) != batch:
            raise ValueError(f"{batch} samples need as many seeds, got {len(seeds)}")
        self._told = cond, uncond
        self._guidance = GuidanceInputs(plan, list(self._experts), batch, cond, uncond)
        self._calls, self._guided = KeptFeatures(self._models), GuidedOutputs()
        self._calls.check(plan, 0, batch)
        self._seeds, self._noise, self._callback = seeds, noise, callback
        self._keep_x0 = keep_x0 and callback is not None
        self._on_device = self._changed = False

    def follow(self, plan: SamplingPlan) -> None:
        """Go on with another plan: one that differs in the guidance of the steps that are left.

        Raises:
            ValueError: other steps.
        """
        plan.check()
        if [s.level for s in plan.steps] != [s.level for s in self.plan.steps]:
            raise ValueError("a run can only follow a plan with its own noise levels")
        self._calls.check(plan, self.index, self.x.shape[0])
        self._change(plan, *self._told)
        if self._on_device:
            self._lay_out_table()

    def tell(self, cond: Conditioning | None, uncond: Conditioning | None) -> None:
        """Go on with other conditioning, as `sample` takes it."""
        self._change(self.plan, cond, uncond)

    def _change(self, plan: SamplingPlan, cond: Conditioning | None, uncond: Conditioning | None) -> None:
        self._guidance = GuidanceInputs(plan, list(self._experts), self.x.shape[0], cond, uncond)
        self.plan, self._told, self._changed = plan, (cond, uncond), True

    @property
    def done(self) -> bool:
        return self.index == len(self.plan)

    def _lay_out_table(self) -> None:
        self._table = self.plan.table(self.x.device)
        self._moving = MovingTable(self.plan, self._table) if self._recordable else None

    def _move_to_device(self) -> None:
        device = self.x.device
        can_record = {name: model for name, model in self._models.items() if hasattr(model, "record")}
        self._recordable = cast(dict[str, RecordableModel], can_record)
        self._lay_out_table()
        self._timesteps = timesteps_of(self.plan, device)
        self._seed_tensor = None
        if self.plan.needs_noise and self._noise is None and self._seeds is not None:
            seeds = seeds_tensor(self._seeds, device)
            if device.type == "cpu" and not self._recordable:
                noisy = [index for index, step in enumerate(self.plan.steps) if step.adds_noise]
                self._noise = NoiseAhead(noisy, self.x, seeds)
            else:
                self._seed_tensor = seeds
        self._memories = [torch.zeros_like(self.x) for _ in range(self.plan.memories)]  # newest first
        self._prediction: torch.Tensor | None = None
        self._finite = FiniteWatch(self.plan, self.x)
        self._on_device = True

    @torch.no_grad()
    def advance(self, until: int | None = None) -> torch.Tensor:
        """Run the steps up to, not including, plan step `until`; None runs to the end.

        Returns:
            The state `x` itself, [B, ...] float32: the level of step `until`, or the plan's last target.

        Raises:
            ValueError: `until` lies behind the run or beyond the plan.
        """
        until = len(self.plan) if until is None else until
        if isinstance(until, bool) or not isinstance(until, int) or not self.index <= until <= len(self.plan):
            raise ValueError(
                f"the run is at step {self.index} of {len(self.plan)}: cannot advance until {until!r}"
            )
        if self.index == until or self.interrupted:
            return self.x
        if not self._on_device:
            self._move_to_device()
        steps = self.plan.steps[self.index : until]
        self._conditioning = self._guidance.of(call for step in steps for call in step.calls)
        inputs = Inputs(self.x, self._experts)
        # The launch that ended the last stretch wrote no inputs: the state says the same.
        current = inputs.write(self.plan.steps[self.index].calls, self.index)
        while self.index < until and not self.interrupted:
            recording, count = self._recorded(current, until)
            if recording is None:
                current = self._step(inputs, current, until)
            else:
                self._replay(recording, count, until)
                current = inputs.write(self._calls_at(self.index, until), self.index)
        self._conditioning = {}
        return self.x

    def check(self) -> None:
        """Whether every step so far left a finite state. It waits for the device: ask when the run is over.

        Raises:
            NonFiniteError: NaN or an infinity, with the step and the expert or callback that it is from.
        """
        if self._on_device:
            self._finite.check()

    def _predict(
        self, call: ExpertCall, following: PlanStep | None, x: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        conditioning = self._conditioning[call.name, call.guided]
        output = self._calls.call(call, following, x, timestep, conditioning)
        return self._guided.of(call, output, self.x, self.index)

    def _step(
        self,
        inputs: Inputs,
        current: list[torch.Tensor],
        until: int,
    ) -> list[torch.Tensor]:
        """One model evaluation and one launch; returns the next step's model inputs."""
        index, step = self.index, self.plan.steps[self.index]
        coming = self.plan.steps[index + 1] if index + 1 < len(self.plan) else None
        outputs = [
            self._predict(call, coming, model_input, timestep)
            for call, model_input, timestep in zip(step.calls, current, self._timesteps[index], strict=True)
        ]
        following = self._calls_at(index + 1, until)
        buffers = inputs.buffers(following, index + 1)
        # Noise exists only where the row asks for it, so a deterministic step never touches the generator.
        noisy, update = step.adds_noise, step.update
        shown = None if update.keeps_x0 else self._shown_x0()
        sampler_step_(
            self.x,
            outputs,
            self._table,
            index,
            memories=self._memories if update.keeps or update.memories else (),
            x0=shown,
            next_inputs=buffers,
            seeds=self._seed_tensor if noisy else None,
            noise=self._noise(index) if noisy and self._noise is not None else None,
            nonfinite=self._finite.by_step,
        )
        if update.keeps:
            self._memories = [*self._memories[-1:], *self._memories[:-1]]
        self.x0 = self._memories[0] if update.keeps_x0 else shown
        self.index += 1
        changed = self._tell_callback(until)
        return inputs.write(self._calls_at(self.index, until), self.index) if changed else buffers

    def _calls_at(self, index: int, until: int) -> tuple[ExpertCall, ...]:
        """A step's calls, none at the end of what is advanced."""
        return () if index == until else self.plan.steps[index].calls

    def _shown_x0(self) -> torch.Tensor | None:
        """Where the callback's x0 is written, if it reads one."""
        if self._keep_x0 and self._prediction is None:
            self._prediction = torch.empty_like(self.x)
        return self._prediction

    def _tell_callback(self, until: int) -> bool:
        """Whether the callback changed the state, or what the models are told."""
        if self._callback is None:
            return False
        index = self.index - 1
        told = {"step": index, "plan_step": self.plan.steps[index], "x": self.x, "x0": self.x0, "run": self}
        replaced = self._callback(told)
        changed, self._changed = self._changed, False
        if changed:
            left = self.plan.steps[self.index : until]
            self._conditioning = self._guidance.of(call for step in left for call in step.calls)
        if replaced is None:
            return changed
        if replaced.shape != self.x.shape:
            raise ValueError(
                f"a callback's state must have shape {list(self.x.shape)}, got {list(replaced.shape)}"
            )
        self.x.copy_(replaced)
        self._finite.see_callback(index)
        return True

    def _recorded(self, current: list[torch.Tensor], until: int) -> tuple[Recording | None, int]:
        """A recording that takes the next steps, and how many; None where a step is taken by itself."""
        step, memories = self.plan.steps[self.index], len(self._memories)
        call = step.calls[0]
        model = self._recordable.get(call.name)
        if model is None or self._moving is None or self._noise is not None:
            return None, 0
        count = steps_alike(self.plan, self.index, until, memories)
        if count < 2:
            return None, 0
        state = {
            "x": self.x,
            "model_input": current[0],
            "timestep": self._timesteps[self.index][0],
            "conditioning": self._conditioning[call.name, call.guided],
            "memories": self._memories,
            "turns": turns_memories(step, memories),
            "x0": self._shown_x0(),
            "seeds": self._seed_tensor,
        }
        return model.record(take_step, **state, **self._moving.at(self.index)), count

    def _replay(self, recording: Recording, count: int, until: int) -> None:
        """Take steps by a recording, `count` or, after a callback that changed something, fewer."""
        state = recording.state
        try:
            for _ in range(count):
                recording.replay()
                self.index += 1
                if self._callback is not None:
                    self._take_over(state)
                    if self._tell_callback(until) or not recording.holds():
                        break
                if self.interrupted:
                    break
        finally:
            if self._callback is None:
                self._take_over(state)

    def _take_over(self, state: Mapping[str, Any]) -> None:
        """What the recording's memory holds of the run, which may be another's soon."""
        self.x.copy_(state["x"])
        for own, made in zip(self._memories, state["memories"], strict=True):
            own.copy_(made)
        if self._prediction is not None:
            self.x0 = self._prediction.copy_(state["x0"])
        else:
            keeps_x0 = self.plan.steps[self.index - 1].update.keeps_x0
            self.x0 = self._memories[0] if keeps_x0 else None
        by_step = self._finite.by_step
        torch.maximum(by_step, state["nonfinite"][: len(by_step)], out=by_step)


def sample(
    plan: SamplingPlan,
    experts: Expert | Iterable[Expert],
    x: torch.Tensor | None = None,
    *,
    shape: Sequence[int] | None = None,
    seeds: Sequence[int] | torch.Tensor | None = None,
    noise: Callable[[int], torch.Tensor] | None = None,
    cond: Conditioning | None = None,
    uncond: Conditioning | None = None,
    device: torch.device | str = "cpu",
    callback: Callback | None = None,
) -> torch.Tensor:
    """Run a plan from its first step to its last (`SamplingRun` can pause in between).

    Args:
        plan: from `moe_sampler.plan`.
        experts: with their models; every expert the plan names must be among them.
        x: [B, ...] float32, the state to start from (it is not modified); or give `shape` and `seeds`.
        shape: [B, ...] of the state to draw.
        seeds: one integer a sample. Noise is a function of (seed, step, element) alone, so a sample is the
            same alone and inside any batch.
        noise: instead of `seeds` for the steps' noise: `noise(step)` returns [B, ...] float32.
        cond, uncond: keyword arguments for the models, tensors with the batch first; or a mapping of them for
            each expert, by name, `{"sol": {"prompt_embeds": ...}, "lune": {...}}`. Guided calls get
            `cat([uncond, cond])`, diffusers' order, unguided calls `cond` alone.
        device: where to run when `x` isn't given.
        callback: gets a dict after each step: `step`, `plan_step`, `x` (the state), `x0` (the prediction;
            both are live buffers, clone what you keep) and `run`, whose `interrupted` it may set to True. A
            returned tensor replaces the state.

    Returns:
        [B, ...] float32: the state at the plan's last target, or where it was interrupted.

    Raises:
        ValueError: missing experts, models, seeds or conditioning, before any model call.
        NonFiniteError: NaN or an infinity came of a step, found when the run is over.
    """
    run = SamplingRun(
        plan,
        experts,
        x,
        shape=shape,
        seeds=seeds,
        noise=noise,
        cond=cond,
        uncond=uncond,
        device=device,
        callback=callback,
    )
    run.advance()
    run.check()
    return run.x
