"""`HybridPipeline`: several experts behind the interface of a diffusers pipeline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self, cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from ..architectures import reusable, reuse_share, shape_of
from ..data.arrays import Picture
from ..loading.parts import check_experts_fit, check_names
from ..sampling.experts import Expert
from ..sampling.guiders import Guider
from ..sampling.plan import SamplingPlan
from ..sampling.reuse import AUTO, Reuse
from ..sampling.routers import PerStep, Router
from .adapters import AdapterMixin
from .base import config_of
from .budget import EVERY, within_budget
from .callbacks import GuidanceMixin, StepEnd
from .checks import Request, Start, check_size, check_strength
from .encoding import EncodingMixin
from .finite import check_finite, naming_weights
from .latents import encode_pixels
from .pretrained import PretrainedMixin
from .prompts import (
    Negative,
    Texts,
    as_list,
    check_clip_skip,
    check_prompts,
    negative_embeds,
    prompt_count,
)
from .queue import PlanRun, run_plan
from .schedules import Schedule, scheduled_plan
from .settings import (
    by_expert,
    check_defaults,
    default_keys,
    default_settings,
    default_solvers,
    enter_plan,
    given_plan,
    guidance_scales,
    hybrid_experts,
    hybrid_plan,
    own_steps,
    with_own,
)
from .start_images import fitted_size, picture_size, pixels_of, start_latents, start_pictures

__all__ = ["HybridPipeline", "HybridPipelineOutput"]


@dataclasses.dataclass
class HybridPipelineOutput(BaseOutput):
    """What a run made.

    Args:
        images: PIL images, or [B, H, W, C] float32 NumPy in [0, 1], or [B, C, H, W] tensors.
        seeds: the seed of each image, or None when a generator was given.
        plan: the plan that was run.
    """

    images: list[Image.Image] | Any
    seeds: list[int] | None
    plan: SamplingPlan

    @classmethod
    def of(cls, images: Any, seeds: list[int] | None, plan: SamplingPlan, return_dict: bool) -> Self:
        """What a pipeline returns. With `return_dict=False` that is a tuple, diffusers' older form, which the
        annotation leaves to who asks for it."""
        return cls(images, seeds, plan) if return_dict else cast(Any, (images,))


class HybridPipeline(PretrainedMixin, EncodingMixin, AdapterMixin, GuidanceMixin):
    """Text to image with several experts: Sol lays the image out, Lune paints it; or others, by any names.

    Args:
        vae: decodes latents; AutoencoderKL or AutoencoderTiny.
        text_encoder, tokenizer: CLIP, shared by the experts.
        experts: names, from noise to data, or one text of them ("sol, lune"); by default the order in which
            the UNets are given.
        handoff: default noise level, between 0 (data) and 1 (noise), where one expert hands over to the next;
            of more than two experts, a list of them, descending.
        num_inference_steps: default steps in all.
        defaults: default settings by name, as another pipeline's `components` have them; what is given beside
            them comes first.
        parts: `unet_<name>` and `scheduler_<name>` of every expert. The schedulers are not run; their configs
            say what each expert was trained on (betas, prediction type, shift, spacing, clipping) and their
            class which solver is its default. `<name>_guidance` is an expert's default guidance scale,
            `<name>_solver` its default solver by name, `<name>_levels` the spacing or levels that go with it.

    Raises:
        TypeError: a part that isn't one.
        ValueError: experts that don't fit the VAE or the text encoder.
    """

    _callback_tensor_inputs = (*StepEnd.STATE, *StepEnd.TEXT)  # as diffusers' pipelines call it

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        experts: Sequence[str] | str | None = None,
        handoff: float | Sequence[float] | None = None,
        num_inference_steps: int | None = None,
        defaults: Mapping[str, Any] | None = None,
        **parts: Any,
    ) -> None:
        super().__init__()
        before = check_defaults(defaults or {})
        given = [key.removeprefix("unet_") for key in parts if key.startswith("unet_")]
        if experts is None:  # in the order they had before, then the others
            experts = [name for name in dict.fromkeys([*before.get("experts", ()), *given]) if name in given]
        names = check_names(experts.split(", ") if isinstance(experts, str) else experts)
        wanted = {f"{part}_{name}" for name in names for part in ("unet", "scheduler")}
        unknown = parts.keys() - wanted - {*default_keys(names)}
        if unknown or wanted - parts.keys():
            what, keys = ("unknown", unknown) if unknown else ("missing", wanted - parts.keys())
            raise TypeError(f"{what} parts of a pipeline of {', '.join(names)}: {', '.join(sorted(keys))}")
        unets = {name: parts[f"unet_{name}"] for name in names}
        shapes = {name: shape_of(unet) for name, unet in unets.items()}
        check_experts_fit(shapes, vae.config, text_encoder.config.to_dict())
        settings = {"handoff": handoff, "num_inference_steps": num_inference_steps, **parts}
        settings = before | {key: value for key, value in settings.items() if value is not None}
        self._register_experts(
            {
                **{"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer},
                **{f"unet_{name}": unet for name, unet in unets.items()},
                **{f"scheduler_{name}": parts[f"scheduler_{name}"] for name in names},
            },
            {"experts": list(names), **default_settings(names, settings)},
        )
        self.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._interrupt = False

    def experts(
        self,
        sol_guidance: float | None = None,
        lune_guidance: float | None = None,
        shift: float | Mapping[str, float] | None = None,
        solver: Any = None,
        eta: float | Mapping[str, float] | None = None,
        *,
        levels: Any = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        guidance_rescale: float | Mapping[str, float] | None = None,
        guidance_window: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
        guider: Guider | str | Mapping[str, Guider | str] | None = None,
        reuse: Reuse | Mapping[str, Reuse] | None = None,
    ) -> tuple[Expert, ...]:
        """The experts as the planner sees them, from noise to data; None leaves a setting at this model's
        default, a mapping sets it by expert. The default of `reuse` is that of `speed`."""
        configs = {name: config_of(getattr(self, f"scheduler_{name}")) for name in self.expert_names}
        names = self.expert_names
        guidance = with_own("guidance_scale", guidance_scale, names, sol=sol_guidance, lune=lune_guidance)
        reused = self._reuse(AUTO if reuse is None and self.speed != "none" else reuse)
        experts = hybrid_experts(
            configs,
            guidance_scales(guidance, self.config, names),
            shift=shift,
            eta=eta,
            **default_solvers({"solver": solver, "levels": levels, "shift": shift}, self.config, names),
            guidance_rescale=guidance_rescale,
            guidance_window=guidance_window,
            guider=guider,
            reuse=reused,
            reuse_share=self._reuse_shares(reused),
        )
        return tuple(self._with_model(expert) for expert in experts)

    def _reuse(self, reuse: Any) -> dict[str, Reuse | None]:
        """By expert. With AUTO every call is full of a model whose features can't be reused."""
        named = by_expert("reuse", reuse, self.expert_names)
        full = {name for name, own in named.items() if own == AUTO and not self._is_reusable(name)}
        return named | dict.fromkeys(full)

    def _is_reusable(self, name: str) -> bool:
        try:
            reusable(self.expert_unet(name))
        except ValueError:
            return False
        return True

    def _reuse_shares(self, reuse: Mapping[str, Reuse | None]) -> dict[str, float]:
        """What calls that reuse features cost, of the experts that have any."""
        return {
            name: reuse_share(self.expert_unet(name).config) for name, own in reuse.items() if own is not None
        }

    def _with_model(self, expert: Expert) -> Expert:
        model = self._expert_model(expert.name)
        return dataclasses.replace(expert, model=model, dtype=model.dtype)

    def plan(
        self,
        expert: str = "hybrid",
        num_inference_steps: int | Mapping[str, int] | None = None,
        sol_steps: int | None = None,
        lune_steps: int | None = None,
        handoff: float | Sequence[float] | None = None,
        router: Router | PerStep | None = None,
        experts: Sequence[Expert] | None = None,
        strength: float | None = None,
        timesteps: Schedule | None = None,
        sigmas: Schedule | None = None,
        budget: float | None = None,
    ) -> SamplingPlan:
        """The plan `__call__` runs with the same arguments; `experts` from `HybridPipeline.experts`."""
        experts = self.experts() if experts is None else experts
        steps = own_steps(num_inference_steps, self.expert_names, sol=sol_steps, lune=lune_steps)
        route = {"num_inference_steps": steps, "handoff": handoff, "router": router}
        listed = timesteps is not None or sigmas is not None

        def compiled(experts: Sequence[Expert], count: int | None = None) -> SamplingPlan:
            own = {"expert": expert, **route}
            own |= {} if count is None else {"num_inference_steps": count}
            if listed:
                whole = scheduled_plan(experts, timesteps, sigmas, **own)
            else:
                whole = hybrid_plan(experts, self.config, **own)
            return whole if strength is None else enter_plan(experts, whole, strength)

        if budget is None:
            return compiled(experts)
        shares = self._reuse_shares(dict.fromkeys(self.expert_names, EVERY[-1]))
        priced = [dataclasses.replace(e, reuse_share=shares[e.name]) for e in experts]
        fixed = listed or isinstance(router, PerStep)
        most = None if fixed else self.config["num_inference_steps"] if steps is None else steps
        return within_budget(budget, priced, most, compiled).plan

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True`, from a callback or another thread, and no more models are called: the
        images are what they are by then."""
        return self._interrupt

    def _size_multiple(self) -> int:
        """What height and width must be multiples of, in pixels."""
        shapes = (shape_of(self.expert_unet(name)) for name in self.expert_names)
        return self.vae_scale_factor * math.lcm(*(shape.size_multiple for shape in shapes))

    def _size(
        self,
        height: int | None,
        width: int | None,
        pictures: Sequence[Picture] | None,
        latents: torch.Tensor | None = None,
    ) -> tuple[int, int]:
        """In pixels: as given, or what the experts were made for, in a start picture's proportions, or a
        start's latents' size.

        Raises:
            ValueError: not a size they can make, or none at all.
        """
        side, multiple = self._any_shape().sample_size, self._size_multiple()
        if latents is not None:
            size = self._size_of(latents, height, width)
        elif side is not None:
            size = fitted_size(pictures, side * self.vae_scale_factor, multiple, height, width)
        elif height is not None and width is not None:
            size = (height, width)
        elif pictures is not None:
            own = picture_size(pictures[0])
            size = (own[0] if height is None else height, own[1] if width is None else width)
        else:
            raise ValueError("the experts' configs name no size: give height and width")
        return check_size(*size, multiple)

    def _size_of(self, latents: torch.Tensor, height: int | None, width: int | None) -> tuple[int, int]:
        own = latents.shape[-2] * self.vae_scale_factor, latents.shape[-1] * self.vae_scale_factor
        if (own[0] if height is None else height, own[1] if width is None else width) != own:
            raise ValueError(
                f"latents {list(latents.shape)} are an image of {own[0]} x {own[1]} pixels: leave out height "
                "and width, or give these"
            )
        return own

    def _image_latents(
        self,
        pictures: Sequence[Picture],
        height: int,
        width: int,
        request: Request,
        device: torch.device,
    ) -> torch.Tensor:
        """float32 latents [pictures, C, h, w] of the images that images start from."""
        pixels = pixels_of(pictures, height, width)
        with self._at_work("vae"):
            parts = [encode_pixels(part.to(device), self.vae) for part in pixels.split(request.batch_size)]
        return torch.cat(parts)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | Mapping[str, int] | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        negative_prompt: Negative | None = None,
        num_images_per_prompt: int = 1,
        eta: float | Mapping[str, float] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        plan: SamplingPlan | None = None,
        image: Any = None,
        strength: float | None = None,
        seed: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        expert: str = "hybrid",
        handoff: float | Sequence[float] | None = None,
        router: Router | PerStep | None = None,
        sol_steps: int | None = None,
        lune_steps: int | None = None,
        timesteps: Schedule | None = None,
        sigmas: Schedule | None = None,
        sol_guidance: float | None = None,
        lune_guidance: float | None = None,
        shift: float | Mapping[str, float] | None = None,
        solver: Any = None,
        levels: Any = None,
        clip_skip: int | None = None,
        guidance_rescale: float | Mapping[str, float] | None = None,
        guidance_window: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
        guider: Guider | str | Mapping[str, Guider | str] | None = None,
        reuse: Reuse | Mapping[str, Reuse] | None = None,
        budget: float | None = None,
    ) -> HybridPipelineOutput:
        """Make images. Arguments diffusers' pipelines have mean what they mean there; settings of experts are
        one value for all, or a mapping by name. The others:

        Args:
            negative_prompt: for all experts, or by name: `{"sol": "text", "lune": "blur"}`.
            plan: run this one, from `plan` or `SamplingPlan.from_json`. It decides experts, steps, handoff,
                solvers and guidance, so none of these may be given with it.
            image: to start from: PIL of any mode, NumPy [H, W, 3] or a tensor [3, H, W], uint8 from 0 to 255
                or floats from 0 to 1; or latents, a tensor [B, C, h, w] as output_type="latent" gives it; one
                for all prompts, or a batch or list, one each. Without height and
                width, what is made has about the size the model was made for, in the image's proportions; the
                image is resized to cover that and cut at the centre.
            strength: with image, the share of the steps that are run, 0.8 by default: the run enters the plan
                where that many steps are left, at the expert who works there. 1 leaves little of the image.
            seed: one integer (counted up over the batch) or one an image. An image depends on its own seed
                alone. Without seed and generator one is drawn, as `torch.manual_seed` decides, and returned.
            batch_size: how many images are sampled at once; by default all.
            expert: "hybrid", or one of them alone.
            handoff: noise level in (0, 1) where an expert hands over to the next; 1 is pure noise, 0 the
                data. Of more than two experts, a list of levels, descending.
            router: over the experts' names, instead of a handoff; e.g. `Crossfade("sol", "lune", 0.8, 0.6)`.
            sol_steps, lune_steps: steps of each expert, instead of `num_inference_steps` in all.
            timesteps, sigmas: the steps themselves, descending, as diffusers' schedulers take them: timesteps
                of a discrete-time expert, sigmas of a flow expert, before its shift. Of one expert alone, or
                by name: `timesteps={"sol": [999, 800]}, sigmas={"lune": [0.6, 0.3]}`.
            sol_guidance, lune_guidance: guidance scales, before `guidance_scale`.
            shift: k of the shifted sigmas of flow experts.
            solver, levels: as `Expert` takes them: `levels="karras"`, or `{"lune": [0.7, 0.4, 0.2]}`.
            guidance_rescale, guidance_window, guider: as `Expert` takes them: `guider="apg momentum -0.5"`.
            reuse: which calls of a model are full, as `Expert` takes it: `reuse=3`, every third; the others
                reuse its deep features and cost a tenth or less. Without `speed` all are by default, with it
                "auto": every third from ten steps on, of models that can; `reuse=1` is all.
            budget: what an image may cost, in full passes through a model (guidance takes two a step): the
                plan has as many of the steps as that pays for, with calls that reuse features where
                full ones would be too many. Where `reuse` is given it stays.
            clip_skip: last layers of CLIP that are left out, for the prompt.
            callback_on_step_end: diffusers' signature (pipeline, step, timestep, kwargs), called for every
                batch; it may return a dict with new `latents`, `prompt_embeds` ([2B, ...], the negative ones
                first, where the step is guided) or `negative_prompt_embeds`, and may set
                `pipe._guidance_scale`. `pred_original_sample` gives the step's x0.

        Returns:
            `HybridPipelineOutput`, or with `return_dict=False` the tuple (images,).

        Raises:
            ValueError: for inputs that don't fit, before any work.
            NonFiniteError: NaN or an infinity, which no image is made of; says what it is from.
        """
        names = self.expert_names
        settings = {
            "guidance_scale": with_own(
                "guidance_scale", guidance_scale, names, sol=sol_guidance, lune=lune_guidance
            ),
            "shift": shift,
            "solver": solver,
            "eta": eta,
            "levels": levels,
            "guidance_rescale": guidance_rescale,
            "guidance_window": guidance_window,
            "guider": guider,
            "reuse": reuse,
        }
        route = {
            "num_inference_steps": own_steps(num_inference_steps, names, sol=sol_steps, lune=lune_steps),
            "handoff": handoff,
            "router": router,
            "timesteps": timesteps,
            "sigmas": sigmas,
            "budget": budget,
        }
        prompt, negative_prompt = as_list(prompt), as_list(negative_prompt)
        channels = self.text_encoder.config.hidden_size
        check_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, names, channels)
        prompts = prompt_count(prompt, prompt_embeds)
        check_clip_skip(clip_skip, self.text_encoder)
        if clip_skip is not None and prompt_embeds is not None:
            raise ValueError("clip_skip acts on how a prompt is encoded: leave it out with prompt_embeds")
        request = Request.read(prompts, num_images_per_prompt, batch_size, output_type)
        step_end = StepEnd(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        given = start_latents(image, self._any_shape().in_channels, prompts)
        pictures = None if image is None or given is not None else start_pictures(image, prompts)
        height, width = self._size(height, width, pictures, given)
        entered = check_strength(strength, image, latents)
        experts = self.experts(**settings)
        if plan is None:
            compiled = self.plan(expert, experts=experts, strength=entered, **route)
        else:
            decided = {"expert": None if expert == "hybrid" else expert, "strength": strength}
            decided |= settings | route
            start_from = {"image": image is not None, "latents": latents is not None}
            compiled = given_plan(plan, experts, **start_from, **decided)
        cells = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        shape = (request.images, self._any_shape().in_channels, *cells)
        start = Start.read(seed, generator, latents, shape)

        self._interrupt = False
        device = self._execution_device  # found by looking through all modules, so once
        encode = partial(self.encode_texts, batch_size=request.batch_size, device=device)
        if prompt_embeds is None:
            cond = encode([] if prompt is None else prompt, clip_skip=clip_skip)
        else:
            cond = prompt_embeds.to(device)
        guided = list(dict.fromkeys(c.name for s in compiled.steps for c in s.calls if c.guided))
        uncond = negative_embeds(negative_prompt, negative_prompt_embeds, guided, names, prompts, encode)
        for embeds in (cond, *uncond.values()):
            check_finite("the prompts' features", embeds, "the text encoder", self.text_encoder)
        if pictures is not None:
            given = self._image_latents(pictures, height, width, request, device)
        run = PlanRun(
            compiled,
            experts,
            shape,
            device,
            cond={"prompt_embeds": cond},
            uncond={name: {"prompt_embeds": embeds.to(device)} for name, embeds in uncond.items()},
            image_latents=None if given is None else _one_an_image(given, request.images),
            residency=self._offload,
        )
        with naming_weights(self.expert_unet, self._with_expert):
            made = run_plan(self, run, request, start, step_end)
        self.maybe_free_model_hooks()
        return HybridPipelineOutput.of(made, start.seeds, compiled, return_dict)


def _one_an_image(latents: torch.Tensor, images: int) -> torch.Tensor:
    """[images, C, h, w] of latents that are one a prompt, or one for all."""
    return latents.repeat_interleave(images // len(latents), 0)
