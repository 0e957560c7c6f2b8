"""`HybridPipeline`: Sol and Lune behind the interface of a diffusers pipeline."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from .checkpoints import CheckpointError, load_component, read_model_index
from .experts import Expert
from .hybrid import DEFAULTS, hybrid_experts, hybrid_plan
from .planning import SamplingPlan
from .routers import Router
from .sampling import sample

__all__ = ["HybridPipeline", "HybridPipelineOutput"]

_VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


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


class HybridPipeline(DiffusionPipeline):
    """Text to image with two experts: Sol lays the image out, Lune paints it.

    Args:
        vae: decodes latents; AutoencoderKL or AutoencoderTiny.
        text_encoder, tokenizer: CLIP, shared by the experts.
        unet_sol, unet_lune: the experts.
        scheduler_sol, scheduler_lune: not run; their configs say what each expert was trained on (betas,
            prediction type, shift, spacing, clipping) and their class which solver is its default.
        handoff: default noise level, between 0 (data) and 1 (noise), where Sol hands over to Lune.
        num_inference_steps: default steps in all.
        sol_guidance, lune_guidance: default guidance scales.
    """

    model_cpu_offload_seq = "text_encoder->unet_sol->unet_lune->vae"
    _callback_tensor_inputs = ("latents", "pred_original_sample")

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet_sol: UNet2DConditionModel,
        unet_lune: UNet2DConditionModel,
        scheduler_sol: SchedulerMixin,
        scheduler_lune: SchedulerMixin,
        handoff: float = DEFAULTS["handoff"],
        num_inference_steps: int = DEFAULTS["num_inference_steps"],
        sol_guidance: float = DEFAULTS["sol_guidance"],
        lune_guidance: float = DEFAULTS["lune_guidance"],
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet_sol=unet_sol,
            unet_lune=unet_lune,
            scheduler_sol=scheduler_sol,
            scheduler_lune=scheduler_lune,
        )
        self.register_to_config(
            handoff=handoff,
            num_inference_steps=num_inference_steps,
            sol_guidance=sol_guidance,
            lune_guidance=lune_guidance,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> HybridPipeline:
        """Load one folder, or hub id, in Stable Diffusion layout with `unet_sol/` and `unet_lune/`.

        Args:
            pretrained_model_name_or_path: a local folder or a hub id.
            kwargs: as `diffusers.DiffusionPipeline.from_pretrained` takes them.

        Raises:
            CheckpointError: anything missing, unreadable, unexpected or misshapen, by name.
        """
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        path = Path(pretrained_model_name_or_path)
        folder = path if path.exists() or path.is_absolute() else None
        if folder is None:
            folder = Path(
                cls.download(str(pretrained_model_name_or_path), **hub, variant=kwargs.get("variant"))
            )
        index = read_model_index(folder)
        vae = index["vae"][1]
        if vae not in _VAES:
            raise CheckpointError(f"{folder}: vae is a {vae}, use one of {', '.join(_VAES)}")
        classes = {
            "vae": _VAES[vae],
            "text_encoder": CLIPTextModel,
            "unet_sol": UNet2DConditionModel,
            "unet_lune": UNet2DConditionModel,
        }
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        options = {name: kwargs[name] for name in ("dtype", "torch_dtype", "variant") if name in kwargs}
        for name in classes.keys() - kwargs.keys():
            kwargs[name] = load_component(classes[name], folder / name, **options)
        return super().from_pretrained(str(folder), **kwargs)

    def experts(
        self,
        sol_guidance: float | None = None,
        lune_guidance: float | None = None,
        shift: float | None = None,
        solver: str | Mapping[str, str] | None = None,
        eta: float | None = None,
    ) -> tuple[Expert, Expert]:
        """Sol and Lune as the planner sees them; None leaves a setting at this model's default."""
        configs = {
            name: {**scheduler.config, "_class_name": type(scheduler).__name__}
            for name, scheduler in (("sol", self.scheduler_sol), ("lune", self.scheduler_lune))
        }
        guidance = {
            "sol": self.config.sol_guidance if sol_guidance is None else sol_guidance,
            "lune": self.config.lune_guidance if lune_guidance is None else lune_guidance,
        }
        experts = hybrid_experts(configs, guidance, shift=shift, solver=solver, eta=eta)
        unets = (self.unet_sol, self.unet_lune)
        return tuple(self._with_model(expert, unet) for expert, unet in zip(experts, unets, strict=True))

    @staticmethod
    def _with_model(expert: Expert, unet: UNet2DConditionModel) -> Expert:
        def model(x: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
            embeds = prompt_embeds.to(unet.dtype)
            return unet(x, timestep, encoder_hidden_states=embeds, return_dict=False)[0]

        return dataclasses.replace(expert, model=model, dtype=unet.dtype)

    def plan(
        self,
        expert: Literal["hybrid", "sol", "lune"] = "hybrid",
        num_inference_steps: int | None = None,
        sol_steps: int | None = None,
        lune_steps: int | None = None,
        handoff: float | None = None,
        router: Router | None = None,
        experts: tuple[Expert, Expert] | None = None,
    ) -> SamplingPlan:
        """The plan `__call__` runs with the same arguments; `experts` from `HybridPipeline.experts`."""
        return hybrid_plan(
            self.experts() if experts is None else experts,
            self.config,
            expert=expert,
            num_inference_steps=num_inference_steps,
            sol_steps=sol_steps,
            lune_steps=lune_steps,
            handoff=handoff,
            router=router,
        )

    def check_inputs(
        self,
        prompt: Any,
        negative_prompt: Any,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        height: int,
        width: int,
        num_images_per_prompt: int,
        output_type: str,
        callback_inputs: Sequence[str],
    ) -> None:
        """Everything that can be wrong with the inputs, before any work."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        prompts = [] if prompt is None else [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts) or prompt == []:
            raise ValueError(f"prompt must be a string or a non-empty list of strings, got {prompt!r}")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
        if isinstance(negative_prompt, list):
            count = len(prompts) or len(prompt_embeds)
            if len(negative_prompt) != count:
                raise ValueError(f"{count} prompts need as many negative prompts, got {len(negative_prompt)}")
        # Every level but the first halves the latents.
        multiple = self.vae_scale_factor * 2 ** (len(self.unet_sol.config.block_out_channels) - 1)
        for name, value in (("height", height), ("width", width)):
            if value < multiple or value % multiple:
                raise ValueError(f"{name} must be a positive multiple of {multiple}, got {value}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'unknown output_type "{output_type}": use pil, np, pt or latent')
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may name {self._callback_tensor_inputs}, not {unknown}"
            )

    def encode_prompt(self, prompt: str | list[str]) -> torch.Tensor:
        """[B, tokens, channels]: CLIP's hidden states. Too long a prompt is cut, with a warning."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        length = self.tokenizer.model_max_length
        for text in prompts:
            ids = self.tokenizer(text, truncation=False).input_ids
            if len(ids) > length:
                cut = self.tokenizer.decode(ids[length - 1 : -1])
                self._warn(f"the prompt is longer than {length} tokens; this was cut off: {cut!r}")
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(self._execution_device)
        return self.text_encoder(tokens.input_ids.to(self._execution_device), attention_mask=mask)[0]

    @staticmethod
    def _warn(message: str) -> None:
        from diffusers.utils import logging

        logging.get_logger(__name__).warning(message)

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Images from float32 latents [B, C, h, w]."""
        if output_type == "latent":
            return latents
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        latents = latents + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        return self.image_processor.postprocess(
            self.vae.decode(latents, return_dict=False)[0].float(), output_type=output_type
        )

    @staticmethod
    def _seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
        """One seed an image: a single `seed` counts up over the batch, so that each can be made alone."""
        if seed is None:
            seed = secrets.randbelow(2**31)
        seeds = [seed + i for i in range(batch)] if isinstance(seed, int) else list(seed)
        if len(seeds) != batch:
            raise ValueError(
                f"{batch} images need {batch} seeds, or one seed to count up from; got {len(seeds)}"
            )
        return seeds

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
        expert: Literal["hybrid", "sol", "lune"] = "hybrid",
        handoff: float | None = None,
        router: Router | None = None,
        sol_steps: int | None = None,
        lune_steps: int | None = None,
        sol_guidance: float | None = None,
        lune_guidance: float | None = None,
        shift: float | None = None,
        solver: str | Mapping[str, str] | None = None,
    ) -> HybridPipelineOutput | tuple:
        """Make images. Arguments diffusers' pipelines have mean what they mean there; the others:

        Args:
            seed: one integer (counted up over the batch) or one an image. An image depends on its own seed
                alone. Without seed, generator and latents a random seed is drawn and returned.
            expert: "hybrid", or one of them alone.
            handoff: noise level in (0, 1) where Sol hands over to Lune; 1 is pure noise, 0 the data.
            router: over "sol" and "lune", instead of a handoff; e.g. `Crossfade("sol", "lune", 0.8, 0.6)`.
            sol_steps, lune_steps: steps of each expert, instead of `num_inference_steps` in all.
            sol_guidance, lune_guidance: guidance scales; `guidance_scale` sets both.
            shift: k of Lune's shifted sigmas.
            solver: "ddpm", "ddim", "euler" or "dpmpp_2m" for both, or by name: `{"sol": "ddpm"}`.
            callback_on_step_end: diffusers' signature (pipeline, step, timestep, kwargs); it may return a
                dict with new `latents`. `pred_original_sample` gives the step's x0.

        Returns:
            `HybridPipelineOutput`, or with `return_dict=False` the tuple (images,).

        Raises:
            ValueError: for inputs that don't fit, before any work.
        """
        height = height or self.unet_sol.config.sample_size * self.vae_scale_factor
        width = width or self.unet_sol.config.sample_size * self.vae_scale_factor
        self.check_inputs(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            height,
            width,
            num_images_per_prompt,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        if guidance_scale is not None:
            sol_guidance = guidance_scale if sol_guidance is None else sol_guidance
            lune_guidance = guidance_scale if lune_guidance is None else lune_guidance
        experts = self.experts(sol_guidance, lune_guidance, shift, solver, eta)
        compiled = self.plan(expert, num_inference_steps, sol_steps, lune_steps, handoff, router, experts)
        prompts = 1 if isinstance(prompt, str) else len(prompt if prompt is not None else prompt_embeds)
        batch = prompts * num_images_per_prompt
        if generator is not None and seed is not None:
            raise ValueError("give either seed or generator, not both")
        seeds = self._seeds(seed, batch) if generator is None else None
        channels = self.unet_sol.config.in_channels
        shape = (batch, channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")

        device = self._execution_device
        cond = self.encode_prompt(prompt) if prompt_embeds is None else prompt_embeds.to(device)
        uncond = None
        if compiled.guided:
            negative = negative_prompt or ""
            uncond = negative_prompt_embeds
            if uncond is None:
                uncond = self.encode_prompt([negative] * prompts if isinstance(negative, str) else negative)
            uncond = {"prompt_embeds": uncond.to(device).repeat_interleave(num_images_per_prompt, 0)}
        cond = {"prompt_embeds": cond.repeat_interleave(num_images_per_prompt, 0)}

        noise = None
        if generator is not None:

            def noise(_step: int) -> torch.Tensor:
                return randn_tensor(shape, generator=generator, device=device)

            if latents is None:
                latents = randn_tensor(shape, generator=generator, device=device) * compiled.initial_scale
        if latents is not None:
            latents = latents.to(device, torch.float32)

        with self.progress_bar(total=len(compiled)) as bar:

            def on_step_end(info: dict[str, Any]) -> torch.Tensor | None:
                bar.update()
                if info["step"] + 1 < len(compiled):
                    bar.set_description(_names(compiled, info["step"] + 1))
                if callback_on_step_end is None:
                    return None
                tensors = {"latents": info["x"], "pred_original_sample": info["x0"]}
                wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                timestep = info["plan_step"].calls[0].timestep
                return (callback_on_step_end(self, info["step"], timestep, wanted) or {}).get("latents")

            bar.set_description(_names(compiled, 0))
            latents = sample(
                compiled,
                experts,
                latents,
                shape=shape,
                seeds=seeds,
                noise=noise,
                cond=cond,
                uncond=uncond,
                device=device,
                callback=on_step_end,
            )
        images = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return HybridPipelineOutput(images, seeds, compiled) if return_dict else (images,)


def _names(compiled: SamplingPlan, index: int) -> str:
    return " + ".join(call.name for call in compiled.steps[index].calls).title()
