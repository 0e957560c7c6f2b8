"""ComfyUI's interfaces, as small as the nodes need them, over models whose denoiser is known.

Written from ComfyUI 0.8.0's conventions; what is left out is what the nodes leave to ComfyUI.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch


class EPS: ...


class V_PREDICTION(EPS): ...


class X0(EPS): ...


class IMG_TO_IMG(X0): ...


class CONST: ...


class ModelSamplingDiscrete:
    def __init__(self, model_config: Any = None) -> None:
        self.linear_start, self.linear_end = 0.00085, 0.012
        roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
        abar = (1.0 - roots**2).cumprod(0)
        self.set_sigmas(((1.0 - abar) / abar).sqrt())

    def set_sigmas(self, sigmas: torch.Tensor) -> None:
        self.sigmas = sigmas.float()


class ModelSamplingDiscreteFlow:
    def __init__(self, model_config: Any = None) -> None:
        self.set_parameters()

    def set_parameters(self, shift: float = 1.0, multiplier: float = 1000.0) -> None:
        self.multiplier = multiplier
        t = torch.arange(1, 1001) / 1000
        self.sigmas = shift * t / (1.0 + (shift - 1.0) * t)


class ModelSamplingFlux:
    """Whose shift is the logarithm of k."""

    def __init__(self, mu: float = 1.15) -> None:
        self.shift = mu
        t = torch.arange(1, 10001, dtype=torch.float64) / 10000
        k = torch.tensor(mu, dtype=torch.float64).exp()
        self.sigmas = (k / (k + (1.0 / t - 1.0))).float()


def sampling_of(schedule: type, kind: type, *args: Any) -> Any:
    return type("ModelSampling", (schedule, kind), {})(*args)


@dataclass
class LatentFormat:
    latent_channels: int = 4
    scale_factor: float = 0.5


class _Inner:
    """What a MODEL is around: the network, the latents' scale, and who patches it now."""

    def __init__(self, patcher: Model) -> None:
        self._format = patcher.latent_format
        self.current_patcher: Model | None = None

    def process_latent_in(self, latent: torch.Tensor) -> torch.Tensor:
        return latent * self._format.scale_factor

    def process_latent_out(self, latent: torch.Tensor) -> torch.Tensor:
        return latent / self._format.scale_factor


@dataclass(eq=False)
class Model:
    """A MODEL.

    Args:
        x0: [B, ...] of (the state with x = alpha x0 + sigma eps, alpha, sigma), what it believes.
        model_sampling: says the convention of the state that it is given.
    """

    x0: Any
    model_sampling: Any
    latent_format: LatentFormat = field(default_factory=LatentFormat)
    load_device: str = "cpu"
    calls: list[tuple[float, float]] = field(default_factory=list)
    """(sigma, guidance) of every call."""

    def __post_init__(self) -> None:
        self.model = _Inner(self)

    def get_model_object(self, name: str) -> Any:
        return getattr(self, name)


class CFGGuider:
    opened: ClassVar[list[Model]] = []
    """Every MODEL that was made ready, in order."""

    def __init__(self, model_patcher: Model) -> None:
        self.model_patcher, self.model_options = model_patcher, {"transformer_options": {}}
        self.original_conds: dict[str, Any] = {}
        self.cfg = 1.0

    def inner_set_conds(self, conds: dict[str, Any]) -> None:
        self.original_conds = dict(conds)

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def sample(
        self,
        noise,
        latent_image,
        sampler,
        sigmas,
        denoise_mask=None,
        callback=None,
        disable_pbar=False,
        seed=None,
    ):
        self.conds, self.inner_model = dict(self.original_conds), self.model_patcher.model
        CFGGuider.opened.append(self.model_patcher)
        prepare_sampling(self.model_patcher, noise.shape, self.conds)
        self.inner_model.current_patcher = self.model_patcher
        if denoise_mask is not None:
            denoise_mask = denoise_mask.reshape(-1, 1, *denoise_mask.shape[-2:]).expand(latent_image.shape)
        try:
            return self.inner_sample(
                noise, latent_image, noise.device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed
            )
        finally:
            self.inner_model.current_patcher = None
            del self.conds, self.inner_model

    def inner_sample(
        self, noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed
    ):
        if latent_image.count_nonzero():
            latent_image = self.inner_model.process_latent_in(latent_image)
        arguments = {"model_options": {"sample_sigmas": sigmas}, "seed": seed}
        made = sampler.sample(
            self, sigmas, arguments, callback, noise, latent_image, denoise_mask, disable_pbar
        )
        return self.inner_model.process_latent_out(made)

    def __call__(self, x, timestep, model_options, seed=None):
        return self.predict_noise(x, timestep, model_options, seed)

    def predict_noise(self, x, timestep, model_options, seed=None):
        """Guidance: the conditional prediction shows the positive conditioning, a number, and the other the
        negative one, by being scaled."""
        model = self.model_patcher
        assert resident == [model], "not on the device"
        assert self.inner_model.current_patcher is model
        sigma = float(timestep[0])
        model.calls.append((sigma, self.cfg))
        flow = isinstance(model.model_sampling, CONST)
        alpha = 1.0 - sigma if flow else 1.0
        x0 = model.x0(x, alpha, sigma)
        cond = x0 * self.conds["positive"]
        if self.cfg == 1.0:
            return cond
        uncond = x0 * self.conds["negative"]
        return uncond + (cond - uncond) * self.cfg


class KSamplerX0Inpaint:
    def __init__(self, model: CFGGuider, sigmas: torch.Tensor) -> None:
        self.inner_model = model
        self.noise: Any = None
        self.latent_image: Any = None

    def __call__(self, x, sigma, denoise_mask, model_options, seed=None):
        if denoise_mask is not None:
            level = float(sigma[0])
            flow = isinstance(self.inner_model.model_patcher.model_sampling, CONST)
            kept = self.latent_image * (1.0 - level if flow else 1.0) + self.noise * level
            x = x * denoise_mask + kept * (1.0 - denoise_mask)
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        if denoise_mask is not None:
            out = out * denoise_mask + self.latent_image * (1.0 - denoise_mask)
        return out


resident: list[Model] = []
"""The device holds one model."""


def prepare_sampling(model: Model, shape: Any, conds: Any, model_options: Any = None) -> None:
    resident[:] = [model]


class Interrupted(Exception): ...


interrupted = False


def throw_exception_if_processing_interrupted() -> None:
    if interrupted:
        raise Interrupted


def prepare_noise(latent: torch.Tensor, seed: int, indices: Any = None) -> torch.Tensor:
    assert indices is None
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))


shown: list[tuple[int, int]] = []
"""(step, of how many) of the previews."""


def prepare_callback(model: Model, steps: int, x0_output: dict[str, torch.Tensor]) -> Any:
    def callback(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
        x0_output["x0"] = x0
        shown.append((step, total))

    return callback


class Slot:
    """An input or output of a schema."""

    def __init__(self, id: str = "", **options: Any) -> None:
        self.id, self.options = id, options


class _Type:
    Input = Output = Slot


class Schema:
    def __init__(self, **said: Any) -> None:
        self.__dict__.update(said)


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class ComfyNode: ...


class ComfyExtension: ...


def _module(name: str, **names: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(names)
    return module


def modules() -> dict[str, types.ModuleType]:
    """For `sys.modules`."""
    own = vars(sys.modules[__name__])

    def some(name: str, *names: str) -> types.ModuleType:
        return _module(name, **{key: own[key] for key in names})

    kinds = [
        "Model",
        "Conditioning",
        "String",
        "Float",
        "Int",
        "Combo",
        "Latent",
        "Image",
        "Guider",
        "Custom",
    ]
    io = _module(
        "io", Schema=Schema, NodeOutput=NodeOutput, ComfyNode=ComfyNode, **dict.fromkeys(kinds, _Type)
    )
    io.Custom = lambda name: _Type
    ui = _module("ui", PreviewImage=lambda image, cls: image)
    parts = {
        "model_sampling": some(
            *("comfy.model_sampling", "EPS", "V_PREDICTION", "X0", "IMG_TO_IMG", "CONST"),
            *("ModelSamplingDiscrete", "ModelSamplingDiscreteFlow"),
        ),
        "samplers": some("comfy.samplers", "CFGGuider", "KSamplerX0Inpaint"),
        "sampler_helpers": some("comfy.sampler_helpers", "prepare_sampling"),
        "sample": _module(
            "comfy.sample",
            prepare_noise=prepare_noise,
            fix_empty_latent_channels=lambda model, latent: latent,
        ),
        "model_management": _module(
            "comfy.model_management",
            throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted,
            intermediate_device=lambda: torch.device("cpu"),
        ),
        "sd": _module("comfy.sd"),
        "utils": _module("comfy.utils"),
    }
    comfy = _module("comfy", **parts)
    return {
        "comfy": comfy,
        **{f"comfy.{name}": part for name, part in parts.items()},
        "comfy_api": _module("comfy_api"),
        "comfy_api.latest": _module("comfy_api.latest", io=io, ui=ui, ComfyExtension=ComfyExtension),
        "latent_preview": _module("latent_preview", prepare_callback=prepare_callback),
        "folder_paths": _module("folder_paths", get_filename_list=lambda folder: [f"{folder}.safetensors"]),
    }
