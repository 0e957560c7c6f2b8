"""A diffusers pipeline with any number of experts: its components, and where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, Self

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, ModelMixin
from diffusers.utils import logging

from ..architectures import ModelShape, shape_of
from ..architectures.captured_model import CapturedModel, Recordings
from ..architectures.expert_model import ExpertModel
from ..loading.dtypes import read_dtypes
from ..loading.folders import SHARED
from ..loading.parts import scheduler_from_config
from ..loading.presets import training_config
from ..loading.weights import ExpertWeights
from .offload import ExpertOffload, Offload, check_offload
from .projections import join_projections
from .speed import (
    Speed,
    check_speed,
    compile_blocks,
    experts_read_channels_last,
    lay_out,
    run_uncompiled,
)

__all__ = ["ExpertPipeline", "config_of"]

_OF_EACH_EXPERT = ("unet", "scheduler")
"""Components that diffusers' pipelines have one of, and these one an expert."""


class ExpertPipeline(DiffusionPipeline):
    """What `HybridPipeline` needs beyond diffusers: a set of components that isn't fixed by the class.

    Experts are `unet_<name>` with `scheduler_<name>`, as attributes, in `components` and as folders.
    """

    def _register_experts(self, components: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Called once by the constructor, with the experts' models among the components, in order."""
        self._component_names = tuple(components)
        self._setting_names = tuple(settings)
        self.expert_names = tuple(n.removeprefix("unet_") for n in components if n.startswith("unet_"))
        self._weights: dict[str, ExpertWeights] = {}
        self._license: str | None = None
        self._loaded_by: str | None = None
        self._offload: ExpertOffload | None = None
        self._speed: Speed = "none"
        self._compiled: list[torch.nn.Module] = []
        self._cuda_graphs = False
        self._findings: dict[tuple, tuple[list[tuple], Any]] = {}
        self._recordings: dict[str, Recordings] = {}
        self.register_modules(**components)
        self.register_to_config(**settings)
        self.model_cpu_offload_seq = "->".join(
            ["text_encoder", *(f"unet_{name}" for name in self.expert_names), "vae"]
        )

    @property
    def components(self) -> dict[str, Any]:
        """What a pipeline like this one is made of: `HybridPipeline(**pipe.components)`. Beside components it
        has the `defaults`, as the constructor takes them."""
        return {**super().components, "defaults": {name: self.config[name] for name in self._setting_names}}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_EACH_EXPERT:
            raise AttributeError(self._where(name))
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_EACH_EXPERT:
            raise AttributeError(self._where(name))
        return super().__getattr__(name)

    def _where(self, component: str) -> str:
        own = " and ".join(f"{component}_{name}" for name in self.__dict__.get("expert_names", ()))
        told = "; a call's solver= chooses how it is sampled" if component == "scheduler" else ""
        return f"every expert has a {component} of its own: use {own}{told}"

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold the weights themselves, so they have no use for where these came from.
        if self._offload is not None:
            raise ValueError('this pipeline\'s weights are in files: call set_offload("none") to copy it')
        return {**self.__dict__, "_weights": {}, "_findings": {}, "_recordings": {}}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, *, expert: str = "base", **parts: Any) -> Self:
        """A pipeline of another one's components, which both then share, at its speed.

        Args:
            pipeline: one like this; or Stable Diffusion's, of which an expert is made that works alone, or
                with others among the parts.
            expert: that expert's name.
            parts: components and default settings in place of the pipeline's. `torch_dtype` or `dtype` casts
                all of them, in both pipelines; without it nothing is cast.

        Raises:
            ValueError: a pipeline without the components of Stable Diffusion, or whose experts are in files.
        """
        dtype = read_dtypes(parts.pop("dtype", None), parts.pop("torch_dtype", None))
        if getattr(pipeline, "offload", "none") == "expert":
            raise ValueError('this pipeline\'s weights are in files: call set_offload("none") to share them')
        own = isinstance(pipeline, ExpertPipeline)
        found = pipeline.components if own else _as_expert(pipeline, expert)
        make: Any = cls
        made: Self = make(**{**found, **parts})
        if dtype is not None:
            made.to(dtype=dtype)
        if isinstance(pipeline, ExpertPipeline):
            made._weights.update(pipeline._weights)
            made._compiled = list(pipeline._compiled)
            if pipeline.speed != "none":
                made.set_speed(pipeline.speed)  # that of the models they share, for new parts too
        return made

    @classmethod
    def _get_signature_keys(cls, obj: Any) -> tuple[list[str], list[str]]:
        # diffusers reads the components off the constructor's signature; ours are a pipeline's own.
        if isinstance(obj, ExpertPipeline) and hasattr(obj, "_component_names"):
            return sorted(obj._component_names), sorted(obj._setting_names)
        return super()._get_signature_keys(obj)

    def expert_unet(self, expert: str) -> ModelMixin:
        """An expert's model by the expert's name.

        Raises:
            ValueError: no such expert.
        """
        if expert not in self.expert_names:
            raise ValueError(f'unknown expert "{expert}": use {" or ".join(self.expert_names)}')
        return getattr(self, f"unet_{expert}")

    def _any_shape(self) -> ModelShape:
        """What the experts' models take and give: all of them work on the same latents."""
        return shape_of(self.expert_unet(self.expert_names[0]))

    def _expert_weights(self) -> dict[str, ExpertWeights]:
        """Every expert's weights; a model put in place of another has no files."""
        for name in self.expert_names:
            if name not in self._weights or self._weights[name].model is not self.expert_unet(name):
                self._weights[name] = ExpertWeights(self.expert_unet(name))
        return {name: self._weights[name] for name in self.expert_names}

    @property
    def offload(self) -> Offload:
        """Which of `set_offload`'s modes is on."""
        if self._offload is not None:
            return "expert"
        return "model" if getattr(self, "_all_hooks", None) else "none"

    def set_offload(self, offload: Offload, device: torch.device | str | None = None) -> None:
        """Choose what is in the memory of the device that computes.

        Args:
            offload: "none": everything. "model": one component at a time, by diffusers'
                `enable_model_cpu_offload`. "expert": the experts at work, of which one is resident at a time
                outside of crossfades; with more prompts than `batch_size`, all batches go through one
                expert's steps before the next expert comes, so each moves once. On CUDA the next expert is
                copied beside the last step before it, if there is room, from pinned host memory; on a CPU
                experts are read from their memory-mapped files and given up after.
            device: to compute on. By default CUDA where it is, else where the pipeline is; with "none", where
                the pipeline is.

        Raises:
            ValueError: an unknown mode; "model" without an accelerator; "expert" on a CPU for experts that
                were not loaded from files.
        """
        check_offload(offload)
        device = self._offload_target(device, offload)
        if offload == "model" and device.type == "cpu":
            raise ValueError('offload="model" moves components to an accelerator, and there is none')
        weights = self._expert_weights()
        if offload == "expert" and device.type == "cpu":
            ExpertOffload.check(weights, device)
        self._recordings.clear()
        if self._offload is not None:
            self._offload.end("cpu")
            self._offload = None
        self.remove_all_hooks()
        if offload == "none":
            self.to(device)
        elif offload == "model":
            self.enable_model_cpu_offload(device=device)
        else:
            self.vae.to("cpu")
            self.text_encoder.to("cpu")
            self._offload = ExpertOffload(weights, device)

    def _offload_target(self, device: torch.device | str | None, offload: str) -> torch.device:
        if device is None:
            here = self._execution_device
            pick = offload != "none" and here.type == "cpu" and torch.cuda.is_available()
            return torch.device("cuda", 0) if pick else here
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("CUDA is not available here")
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As diffusers' `to`. With offload="expert" a device is where the experts come to work."""
        if self._offload is None:
            self._recordings.clear()
            return super().to(*args, **kwargs)
        device, dtype, _, _ = torch._C._nn._parse_to(  # pyright: ignore[reportAttributeAccessIssue]: no stub
            *args, **{key: value for key, value in kwargs.items() if key != "silence_dtype_warnings"}
        )
        if dtype is not None:
            super().to(dtype)
        if device is not None:
            device = self._offload_target(device, "expert")
            ExpertOffload.check(self._expert_weights(), device)
            self._offload.device = device
        return self

    @property
    def _execution_device(self) -> torch.device:
        if self._offload is not None:
            return self._offload.device
        modules = [m for m in self.components.values() if isinstance(m, torch.nn.Module)]
        return self._found("device", modules, lambda: super(ExpertPipeline, self)._execution_device)

    def _dtype_of(self, model: torch.nn.Module) -> torch.dtype:
        """What a model computes in."""
        return self._found("dtype", [model], lambda: model.dtype)

    def _found(self, what: str, modules: Sequence[torch.nn.Module], look: Callable[[], Any]) -> Any:
        """What diffusers finds by looking through every submodule for hooks, which takes as long as a few
        steps: looked for again only once one of the modules is another, was moved, cast or hooked."""
        key = what, *map(id, modules)
        state = [
            (p.device, p.dtype, hasattr(m, "_hf_hook"), hasattr(m, "_diffusers_hook"))
            for m in modules
            for p in islice(m.parameters(), 1)
        ]
        if key not in self._findings or self._findings[key][0] != state:
            self._findings[key] = state, look()
        return self._findings[key][1]

    @contextmanager
    def _at_work(self, component: str) -> Iterator[None]:
        """A component that isn't an expert, on the device that computes for as long as the block lasts."""
        module, device = getattr(self, component), self._execution_device
        moves = self._offload is not None and module.device != device
        if moves:
            module.to(device)
        try:
            yield
        finally:
            if moves:
                module.to("cpu")

    def _with_expert(self, expert: str) -> Any:
        """A block in which an expert's weights are in memory."""
        return nullcontext() if self._offload is None else self._offload.using(expert)

    def _expert_model(self, name: str) -> ExpertModel:
        """An expert's model as a run calls it."""
        unet = self.expert_unet(name)
        dtype = self._dtype_of(unet)
        if not self._cuda_graphs or self.offload != "none" or not _stays_on_cuda(unet):
            return ExpertModel(unet, dtype)
        kept = self._recordings.get(name)
        if kept is None or kept.model is not unet:
            kept = self._recordings[name] = Recordings(unet)
        return CapturedModel(kept, dtype)

    @property
    def speed(self) -> Speed:
        """Which of `set_speed`'s levels is on."""
        return self._speed

    def set_speed(self, speed: Speed) -> None:
        """Make the experts and the VAE faster, in the number format they are in.

        Args:
            speed: "none": as they are. "fast": the weights of convolutions lie as they are read (channels
                last, where that is faster), and an attention's projections of one input are one product, by
                which images differ from those of "none" by rounding; and calls have `reuse="auto"` where they
                say nothing else, by which images differ to be seen. "max": the experts and the VAE's decoder
                are also compiled, block by block, and with `enable_cuda_graphs`; the first image of each size
                takes longer, and torch keeps what it compiled for other processes.

        Whatever was on before, the images are those of the level that is on.

        Raises:
            ValueError: an unknown level; "max" for a model without repeated blocks.
        """
        check_speed(speed)
        experts = [self.expert_unet(name) for name in self.expert_names]
        if speed == "max":
            self._compiled += compile_blocks([*experts, self.vae.decoder])
            self.enable_cuda_graphs()
        elif self._speed == "max":
            run_uncompiled(self._compiled)
            self._compiled = []
            self.disable_cuda_graphs()
        fast = speed != "none"
        lay_out(experts, channels_last=fast and experts_read_channels_last(self._execution_device))
        lay_out([self.vae], channels_last=fast)
        join_projections(experts, joined=fast)
        self._speed = speed

    def enable_cuda_graphs(self) -> None:
        """Let an expert's steps be recorded as a CUDA graph, which the host then starts at once: on a large
        GPU an image of usual size otherwise takes as long as Python does. Where a step asks more of the host
        (several experts, reuse, guiders), the model's call is recorded alone.

        It counts while the experts are on a CUDA device and none is offloaded. Each size and batch is
        recorded at its first step, by calling the model thrice, and keeps the memory of a call; a model that
        is changed is recorded anew.
        """
        self._cuda_graphs = True

    def disable_cuda_graphs(self) -> None:
        """Call models as usual again, and give up the recordings' memory."""
        self._cuda_graphs = False
        self._recordings.clear()

    def compile(self, **kwargs: Any) -> None:
        """`torch.compile` every expert; kwargs are for it. Each size's first image takes longer."""
        for name in self.expert_names:
            self.expert_unet(name).compile(**kwargs)

    def enable_vae_slicing(self) -> None:
        """Decode one image of a batch at a time."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large images in overlapping tiles."""
        if isinstance(self.vae, AutoencoderTiny):
            # It takes its scale for 8, whatever its config says (2 to the power of the image's channels).
            scale = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
            self.vae.spatial_scale_factor = scale
            self.vae.tile_latent_min_size = self.vae.tile_sample_min_size // scale
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()


def _stays_on_cuda(model: Any) -> bool:
    """By its weights: with diffusers' group offloading a model calls its device what they only come to for a
    while."""
    return all(parameter.device.type == "cuda" for parameter in model.parameters())


def _as_expert(pipeline: DiffusionPipeline, name: str) -> dict[str, Any]:
    """The components of a pipeline of Stable Diffusion, its UNet and scheduler as an expert's."""
    found = pipeline.components
    absent = [part for part in (*SHARED, *_OF_EACH_EXPERT) if found.get(part) is None]
    if absent:
        raise ValueError(
            f"an expert is made of Stable Diffusion's components, and a {type(pipeline).__name__} has no "
            + " and no ".join(absent)
        )
    # How Stable Diffusion's pipeline happens to sample says how the model was trained, not how to sample it.
    scheduler = scheduler_from_config(training_config(config_of(found["scheduler"])))
    renamed = {f"unet_{name}": found["unet"], f"scheduler_{name}": scheduler}
    left = [k for k, v in found.items() if v is not None and k not in (*SHARED, *_OF_EACH_EXPERT)]
    if left:
        logging.get_logger(__name__).warning(f"left out, as they have no place here: {', '.join(left)}")
    return {part: found[part] for part in SHARED} | renamed


def config_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config, with its class."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}
