"""`StudentPipeline`: text to image with the student, alone or guided by Sol and Lune."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from tqdm.auto import tqdm

from moe_sampler import Expert, SamplingPlan
from moe_sampler.architectures import reuse_share as hybrid_reuse_share
from moe_sampler.architectures import shape_of
from moe_sampler.loading.hub import Hub
from moe_sampler.pipelines.callbacks import GuidanceMixin, StepEnd
from moe_sampler.pipelines.checks import Request, Start, check_size
from moe_sampler.pipelines.finite import check_finite, naming_weights
from moe_sampler.pipelines.hybrid import HybridPipeline, HybridPipelineOutput
from moe_sampler.pipelines.latents import decode_latents
from moe_sampler.pipelines.prompts import Negative, check_prompts, negative_embeds
from moe_sampler.pipelines.queue import PlanRun, run_plan
from moe_sampler.pipelines.settings import by_expert, given_plan
from moe_sampler.publishing.upload import Target, pushed, saved
from moe_sampler.sampling.reuse import Reuse
from moe_sampler.tinyflux.features.encoders import StudentEncoders
from moe_sampler.tinyflux.model import lora
from moe_sampler.tinyflux.model.loading import STUDENT_FOLDER
from moe_sampler.tinyflux.model.published import write_student_lora
from moe_sampler.tinyflux.model.tinyflux import TinyFlux
from moe_sampler.tinyflux.sampling.expert import STUDENT
from moe_sampler.tinyflux.sampling.fitting import check_experts, check_student, default_side, scaling_of
from moe_sampler.tinyflux.sampling.folder import find_pipeline, write_pipeline
from moe_sampler.tinyflux.sampling.guided import GuidedRouter, Weight, guided_experts, guided_plan
from moe_sampler.tinyflux.sampling.reuse import reuse_share

if TYPE_CHECKING:
    from typing import Self

__all__ = ["StudentPipeline"]


class StudentPipeline(GuidanceMixin):
    """A student with its encoders and, to be guided, a pipeline of experts on the same latents.

    Args:
        student: predicts.
        encoders: the VAE and text encoders it was trained with.
        experts: with Sol and Lune, or one of them.
        sample_size: side of the latents where no height and width are given and the student's config names
            none; the experts' by default.

    Raises:
        ValueError: parts that don't fit each other.
    """

    def __init__(
        self,
        student: TinyFlux,
        encoders: StudentEncoders,
        experts: HybridPipeline | None = None,
        sample_size: int | None = None,
    ) -> None:
        check_student(student, encoders)
        if experts is not None:
            check_experts(student, encoders, experts)
            sample_size = sample_size or shape_of(experts.expert_unet(experts.expert_names[0])).sample_size
        self.student, self.encoders, self.hybrid = student.eval(), encoders, experts
        own = student.config["sample_size"]
        self.sample_size = (sample_size, sample_size) if own is None else tuple(own)
        self.image_processor = VaeImageProcessor(vae_scale_factor=encoders.scale)
        self._interrupt, self._bar_settings = False, {}
        self.loaded_from: str | None = None
        """What `from_pretrained` was given, where it was given nothing else."""

    @classmethod
    def from_pretrained(
        cls,
        student: str | os.PathLike | TinyFlux,
        experts: str | os.PathLike | HybridPipeline | None = None,
        *,
        encoders: str | os.PathLike | None = None,
        vae: str | os.PathLike | None = None,
        clip: str | os.PathLike | None = None,
        t5: str | os.PathLike | None = None,
        t5_length: int | None = None,
        ema: bool | str = False,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
    ) -> Self:
        """Load a student, and what it needs to paint.

        Args:
            student: what `TinyFlux.from_pretrained` takes, with ema; or what `save_pretrained` wrote or
                `push_to_hub` uploaded, which has the encoders beside it; or a student itself.
            experts: a pipeline's folder or hub id with Sol and Lune, or one that is loaded, to guide the
                student. Without it the student paints alone.
            encoders: a pipeline's folder or hub id with the student's VAE and text encoders; by default what
                the student's config names, else the experts' own.
            vae, clip, t5, t5_length: other encoders, as `StudentEncoders.gather` takes them.
            dtype, torch_dtype: of the student and of experts that are loaded here; float32.
            device: of everything.
            revision, subfolder: of the student's hub repository, or folder.
            cache_dir, local_files_only, token, force_download: for the hub.

        Raises:
            CheckpointError: something cannot be loaded.
            ValueError: parts that don't fit each other, or neither experts nor encoders.
        """
        hub = Hub(cache_dir, local_files_only, token, force_download)
        dtype = dtype or torch_dtype or torch.float32
        places = {"encoders": encoders, "vae": vae, "clip": clip, "t5": t5}
        told = any(places.values())
        name = None if isinstance(student, TinyFlux) or told or experts is not None else os.fspath(student)
        if isinstance(student, TinyFlux):
            model = student
        else:
            whole = find_pipeline(hub.look(student, revision=revision, subfolder=subfolder))
            if whole is not None:
                student, revision, subfolder = whole / STUDENT_FOLDER, None, None
                places = places if told else places | {"encoders": whole}
            place = {"revision": revision, "subfolder": subfolder}
            model = TinyFlux.from_pretrained(student, ema=ema, **place, **vars(hub))
        model = model.to(dtype)
        given: dict[str, Any] = dict(model.config["encoders"] or {})
        if any(places.values()):
            given = places | {key: value for key, value in given.items() if key == "t5_length"}
        if t5_length is not None:
            given["t5_length"] = t5_length
        if experts is None and not given.get("encoders") and not (given.get("vae") and given.get("clip")):
            raise ValueError("say which encoders the student was trained with: give encoders= or experts=")
        if experts is not None and not isinstance(experts, HybridPipeline):
            experts = HybridPipeline.from_pretrained(experts, dtype=dtype, **vars(hub))
        made = StudentEncoders.gather(experts, **given, hub=hub)
        pipeline = given.get("encoders")
        side = None if pipeline is None else default_side(pipeline, hub)
        pipe = cls(model, made, experts, side).to(device)
        pipe.loaded_from = name
        return pipe

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        *,
        examples: Sequence[str] = (),
        license: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the student with its VAE and text encoders into one folder, which `from_pretrained` reads
        without any other, and diffusers' own loader, too; with a card. Experts are not a part of it.

        Args:
            save_directory: created if need be.
            push_to_hub: upload the folder, too; kwargs are those of `publishing.upload.Target`.
            examples: prompts of pictures that the card shows, made now by the student alone.
            license: the student's, as the hub calls it.

        Raises:
            ValueError: the student has adapters, which a folder of this layout doesn't hold.
            CheckpointError: the hub doesn't take it.
            OSError: the folder can't be written; what was in it before is untouched.
        """
        write = partial(write_pipeline, self, Path(save_directory), examples, license)
        saved(write, save_directory, "student", push_to_hub, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        examples: Sequence[str] = (),
        license: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes; returns the commit's address. Arguments as there, and as
        `publishing.upload.Target` takes them."""
        target = Target(repo_id, private, token, commit_message, create_pr, revision, subfolder)
        return pushed(partial(write_pipeline, self, None, examples, license), target, "student")

    def to(self, device: torch.device | str) -> Self:
        """Everything to a device."""
        self.student.to(device)
        self.encoders.to(device)
        if self.hybrid is not None:
            self.hybrid.to(device)
        return self

    # Adapters

    def load_lora_weights(
        self,
        source: str | os.PathLike,
        adapter_name: str = "default",
        scale: float = 1.0,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        **hub: Any,
    ) -> None:
        """Load a LoRA of the student, which acts from now on beside those there are.

        Args:
            source, weight_name, revision, subfolder: as `moe_sampler.tinyflux.model.lora.read_lora` takes
                them.
            adapter_name: for `set_adapters`.
            scale: how strongly it acts.
            hub: as `Hub` takes it (`token`, `cache_dir`, `local_files_only`, `force_download`).

        Raises:
            CheckpointError: no LoRA of this student.
            ValueError: no peft; an adapter of this name is there already.
        """
        place = {"weight_name": weight_name, "revision": revision, "subfolder": subfolder}
        layers = lora.read_lora(source, self.student, Hub(**hub), **place)
        lora.put_lora(self.student, layers, adapter_name, scale)

    def save_lora_weights(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str = "default",
        push_to_hub: bool = False,
        *,
        license: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write an adapter as `load_lora_weights`, ComfyUI and others read it, with a card.

        Args:
            save_directory: created if need be.
            adapter_name: which.
            push_to_hub: upload the folder, too; kwargs are those of `publishing.upload.Target`.
            license: the LoRA's, as the hub calls it.

        Raises:
            ValueError: no adapter of this name.
            CheckpointError: the hub doesn't take it.
            OSError: the folder can't be written.
        """
        tensors = lora.lora_tensors(lora.placed_lora(self.student, adapter_name))
        final = Path(save_directory)
        write = partial(write_student_lora, self.loaded_from, self.student.config, tensors, final, license)
        saved(write, save_directory, "LoRA", push_to_hub, **kwargs)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0
    ) -> None:
        """Which adapters act, and how strongly, one number for all or one each; the others don't."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = (
            [*adapter_weights] if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        )
        lora.set_scales(self.student, dict(zip(names, weights, strict=True)))

    def fuse_lora(self) -> None:
        """Add what acts to the student's weights, for good."""
        lora.fuse_lora(self.student)

    def unload_lora_weights(self) -> None:
        """Take all adapters off; the student is as it was before."""
        lora.take_lora(self.student)

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The student, then who can guide it."""
        return (STUDENT, *(() if self.hybrid is None else self.hybrid.expert_names))

    @property
    def interrupt(self) -> bool:
        """As `HybridPipeline.interrupt`."""
        return self._interrupt

    def set_progress_bar_config(self, **settings: Any) -> None:
        """As in diffusers: keyword arguments of tqdm."""
        self._bar_settings = settings

    def progress_bar(self, total: int) -> tqdm:
        return tqdm(total=total, **self._bar_settings)

    def experts(
        self,
        guidance_scale: float | Mapping[str, float] | None = None,
        shift: float | Mapping[str, float] | None = None,
        solver: Any = None,
        upstream_schedule: bool | None = None,
        levels: Any = None,
        reuse: Reuse | Mapping[str, Reuse] | None = None,
    ) -> tuple[Expert, ...]:
        """The student and those who can guide it, as the planner sees them. Settings are one for all, or by
        name; None leaves them to each expert's default."""
        hybrid = self.hybrid
        return guided_experts(
            self.student,
            () if hybrid is None else hybrid.expert_names,
            (lambda **_: ()) if hybrid is None else hybrid.experts,
            guidance_scale=guidance_scale,
            shift=shift,
            solver=solver,
            levels=levels,
            upstream_schedule=upstream_schedule,
            reuse=reuse,
        )

    def plan(
        self,
        num_inference_steps: int | Mapping[str, int] | None = None,
        sol_weight: Weight = 0.0,
        lune_weight: Weight = 0.0,
        handoff: float | None = None,
        experts: Sequence[Expert] | None = None,
        budget: float | None = None,
    ) -> SamplingPlan:
        """The plan `__call__` runs with the same arguments; `experts` from `StudentPipeline.experts`."""
        experts = self.experts() if experts is None else experts
        if handoff is None and self.hybrid is not None:
            handoff = self.hybrid.config["handoff"]
        settings = {} if handoff is None else {"handoff": handoff}
        router = GuidedRouter(sol_weight, lune_weight, student=experts[0].name, **settings)
        if budget is not None:
            experts = [self._priced(expert, router.guides) for expert in experts]
        return guided_plan(experts[0], experts[1:], router, num_inference_steps, budget)

    def _priced(self, expert: Expert, guides: Sequence[str]) -> Expert:
        """What its calls would cost that reuse features, if it may be asked to."""
        if expert.name not in (STUDENT, *guides):
            return expert
        price = reuse_share if expert.name == STUDENT else hybrid_reuse_share
        return dataclasses.replace(expert, reuse_share=price(self._model_of(expert.name).config))

    def encode_prompt(self, texts: Sequence[str], batch_size: int | None = None) -> dict[str, Tensor]:
        """What the student is told of texts, encoded `batch_size` at once: encoder_hidden_states [B, L, D]
        and pooled_projections [B, P], float32, and encoder_attention_mask, bool [B, L], if it knows one."""
        size = batch_size or len(texts)
        parts = [self.encoders.text(texts[i : i + size]) for i in range(0, len(texts), size)]
        named = {
            "encoder_hidden_states": [part.states for part in parts],
            "pooled_projections": [part.pooled for part in parts if part.pooled is not None],
        }
        if self.student.config["text_mask"]:
            named["encoder_attention_mask"] = [part.mask for part in parts]
        return {name: torch.cat(tensors).to(self.device) for name, tensors in named.items()}

    def decode_latents(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Images from float32 latents [B, C, h, w]."""
        vae = self.encoders.vae
        scaling = scaling_of(self.student, vae)
        return decode_latents(latents, vae, self.image_processor, output_type, scaling=scaling)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | Mapping[str, int] | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        negative_prompt: Negative | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        plan: SamplingPlan | None = None,
        sol_weight: Weight = 0.0,
        lune_weight: Weight = 0.0,
        handoff: float | None = None,
        seed: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        shift: float | Mapping[str, float] | None = None,
        solver: Any = None,
        upstream_schedule: bool | None = None,
        levels: Any = None,
        reuse: Reuse | Mapping[str, Reuse] | None = None,
        budget: float | None = None,
    ) -> HybridPipelineOutput:
        """Make images. Arguments that `HybridPipeline` has mean what they mean there; the student's name, for
        settings by name, is "tinyflux". The others:

        Args:
            guidance_scale: 3 for the student and the experts' own defaults, where it isn't given. The
                student's unconditional side is its null condition, or the negative prompt that its config
                names, Sol's and Lune's the empty prompt; a negative prompt takes the place of all.
            plan: run this one, from `plan` or `SamplingPlan.from_json`, instead of what the settings below,
                steps, solvers and guidance would make.
            sol_weight, lune_weight: shares of the prediction, 0 to 1, see `GuidedRouter`; the student has
                the rest.
            handoff: noise level down to which Sol's weight counts, and from which Lune's does; the experts'
                own by default.
            reuse: as `HybridPipeline` takes it. The student's calls that reuse run its first and last block
                alone and add what those between them did in the last full call.
            budget: as `HybridPipeline` takes it; the cost of a full pass of each model counts alike.
            upstream_schedule: as `tinyflux_expert` takes it; text mask, latents and size are as the student's
                config says.

        Returns:
            `HybridPipelineOutput`, or with `return_dict=False` the tuple (images,).

        Raises:
            ValueError: for inputs that don't fit, before any work.
            NonFiniteError: NaN or an infinity, which no image is made of; says what it is from.
        """
        check_prompts(prompt, None, negative_prompt, None, self.expert_names, 0)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        request = Request.read(len(prompts), num_images_per_prompt, batch_size, output_type)
        step_end = StepEnd(callback_on_step_end, callback_on_step_end_tensor_inputs)
        height, width = self._size(height, width)
        experts = self.experts(guidance_scale, shift, solver, upstream_schedule, levels, reuse)
        if plan is None:
            compiled = self.plan(num_inference_steps, sol_weight, lune_weight, handoff, experts, budget)
        else:
            compiled = given_plan(
                plan,
                experts,
                image=False,
                latents=latents is not None,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                sol_weight=sol_weight or None,
                lune_weight=lune_weight or None,
                handoff=handoff,
                shift=shift,
                solver=solver,
                levels=levels,
                upstream_schedule=upstream_schedule,
                reuse=reuse,
                budget=budget,
            )
        cells = (height // self.encoders.scale, width // self.encoders.scale)
        shape = (request.images, self.student.config["in_channels"], *cells)
        start = Start.read(seed, generator, latents, shape)

        self._interrupt = False
        cond, uncond = self._conditioning(compiled, prompts, negative_prompt, request.batch_size)
        run = PlanRun(compiled, experts, shape, self.device, cond, uncond)
        with naming_weights(self._model_of):
            made = run_plan(self, run, request, start, step_end)
        return HybridPipelineOutput.of(made, start.seeds, compiled, return_dict)

    def _model_of(self, expert: str) -> Any:
        if expert == STUDENT or self.hybrid is None:
            return self.student
        return self.hybrid.expert_unet(expert)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        scale = self.encoders.scale
        sides = [
            side * scale if given is None and side is not None else given
            for given, side in zip((height, width), self.sample_size, strict=True)
        ]
        height, width = sides
        if height is None or width is None:
            raise ValueError("nothing says how large the student's images are: give height and width")
        return check_size(height, width, scale if self.hybrid is None else self.hybrid._size_multiple())

    def _conditioning(
        self, compiled: SamplingPlan, prompts: list[str], negative: Negative | None, batch_size: int
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
        """(cond, uncond), each by expert."""
        guided = {c.name for step in compiled.steps for c in step.calls if c.guided}
        guides = [name for name in compiled.experts if name != STUDENT]
        cond, uncond = {}, {}
        if STUDENT in compiled.experts:
            cond[STUDENT] = self.encode_prompt(prompts, batch_size)
        if STUDENT in guided:
            uncond[STUDENT] = self._unconditional(prompts, negative, cond[STUDENT], batch_size)
        if guides and self.hybrid is not None:
            encode = partial(self.hybrid.encode_texts, batch_size=batch_size, device=self.device)
            states = encode(prompts)
            cond |= {name: {"prompt_embeds": states} for name in guides}
            wanted = [name for name in guides if name in guided]
            embeds = negative_embeds(negative, None, wanted, self.expert_names, len(prompts), encode)
            for features in (states, *embeds.values()):
                check_finite("the prompts' features", features, "the text encoder", self.hybrid.text_encoder)
            uncond |= {name: {"prompt_embeds": value} for name, value in embeds.items()}
        return cond, uncond

    def _unconditional(
        self, prompts: list[str], negative: Negative | None, cond: dict[str, Tensor], batch_size: int
    ) -> dict[str, Tensor]:
        own = by_expert("negative_prompt", negative, self.expert_names)[STUDENT]
        own = own or self.student.config["negative_prompt"]
        if own:
            texts = own if isinstance(own, list) else [own]
            encoded = self.encode_prompt(texts, batch_size)
            return {name: value.expand(len(prompts), *value.shape[1:]) for name, value in encoded.items()}
        length = cond["encoder_hidden_states"].shape[1]
        return self.student.null_condition(len(prompts), length, mask=self.student.config["text_mask"])
