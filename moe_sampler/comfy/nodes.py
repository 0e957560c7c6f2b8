"""The nodes, in ComfyUI's V3 schema. What they do is imported when they do it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

from ..loading.presets import PRESETS
from ..sampling.solvers import SOLVERS
from ..sampling.spacing_names import SPACING_NAMES

__all__ = ["NODES", "comfy_entrypoint"]

CATEGORY = "sampling/mixture of experts"
Experts = io.Custom("MOE_EXPERTS")
Router = io.Custom("MOE_ROUTER")
Plan = io.Custom("MOE_PLAN")

_MODELS_OWN = "as the model says"
_OWN, _COMFYS = "moe-sampler", "ComfyUI"
_PUBLISHED = "published, from the Hugging Face hub"
_KINDS = ("handoff", "crossfade", "spans", "Wan 2.2 text to video", "Wan 2.2 image to video")


def _share(name: str, default: float, tooltip: str, step: float = 0.01) -> io.Float.Input:
    """A number from 0 to 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=step, tooltip=tooltip)


class MoEExpert(io.ComfyNode):
    """A model as one expert of a run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoEExpert",
            display_name="MoE Expert",
            category=CATEGORY,
            description="A model with its conditioning, guidance and solver, as one expert of a run. How it "
            "was trained (eps, v, flow, zero SNR; its shift) is read from the model. Chain experts from "
            "noise to data.",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.String.Input("name", default="expert", tooltip="One word. Routers and plans call it so."),
                io.Float.Input(
                    "guidance", default=5.0, min=0.0, max=100.0, step=0.1, tooltip="cfg; 1 is without."
                ),
                io.Combo.Input("solver", options=list(SOLVERS), default="dpmpp_2m"),
                io.Int.Input("steps", default=0, min=0, max=10000, tooltip="0: a share of the plan's steps."),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Flow models: 0 is as the model says.",
                ),
                _share("eta", 0.0, "Of the solver ddim."),
                _share("guidance_from", 1.0, "Guidance is on from this noise level (1 is pure noise) ..."),
                _share("guidance_to", 0.0, "... to this one."),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed where guidance is above 1."),
                Experts.Input(
                    "experts", optional=True, tooltip="Those that work before this one, at more noise."
                ),
                io.Combo.Input(
                    "levels",
                    options=[_MODELS_OWN, *SPACING_NAMES],
                    default=_MODELS_OWN,
                    optional=True,
                    tooltip="Where the steps lie between noise and data.",
                ),
            ],
            outputs=[Experts.Output(display_name="experts")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        guidance_from: float,
        guidance_to: float,
        experts: Any = (),
        levels: str = _MODELS_OWN,
        **settings: Any,
    ) -> io.NodeOutput:
        from .setups import ExpertSetup

        window = (guidance_from, guidance_to)
        settings["spacing"] = None if levels == _MODELS_OWN else levels
        return io.NodeOutput(
            (
                *(experts or ()),
                ExpertSetup(model=model, positive=positive, guidance_window=window, **settings),
            )
        )


class MoERouter(io.ComfyNode):
    """Who works at which noise level."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoERouter",
            display_name="MoE Router",
            category=CATEGORY,
            description="Who works when, by noise level (1 is pure noise, 0 the image), so that it stays "
            "right under any step count and shift.",
            inputs=[
                io.Combo.Input("kind", options=list(_KINDS), default="handoff"),
                _share(
                    "at",
                    0.7,
                    "The handoff, or where a crossfade begins. Wan's boundaries are their own.",
                    step=0.001,
                ),
                _share("until", 0.5, "Where a crossfade ends.", step=0.001),
                io.String.Input(
                    "spans",
                    default="",
                    placeholder="first 0.7 second 0.4 third 0",
                    tooltip="For any number of experts: each one's name and the noise level it ends at.",
                ),
            ],
            outputs=[Router.Output(display_name="router")],
        )

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        from .setups import RouterSetup

        return io.NodeOutput(RouterSetup(**settings))


class MoEPlan(io.ComfyNode):
    """The whole run, before it starts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoEPlan",
            display_name="MoE Plan",
            category=CATEGORY,
            description="Compiles the run of some experts, and shows it: every step's noise level, who works "
            "there, guidance and solver.",
            is_output_node=True,
            inputs=[
                Experts.Input("experts"),
                io.Int.Input(
                    "steps", default=20, min=1, max=10000, tooltip="Unless the experts have their own."
                ),
                _share(
                    "start",
                    1.0,
                    "The noise level it begins at: below 1 the sampler's latent image is changed.",
                ),
                Router.Input("router", optional=True, tooltip="Needed for more than one expert."),
            ],
            outputs=[
                Plan.Output(display_name="plan"),
                io.Image.Output(display_name="drawing"),
                io.String.Output(display_name="table"),
            ],
        )

    @classmethod
    def execute(cls, experts: Any, steps: int, start: float, router: Any = None) -> io.NodeOutput:
        import numpy as np
        import torch

        from ..viewing.plan_figure import draw_plan
        from .setups import planned

        run = planned(experts, router, steps, start)
        drawing = torch.from_numpy(np.asarray(draw_plan(run.plan), dtype=np.float32) / 255.0)[None]
        return io.NodeOutput(run, drawing, str(run.plan), ui=ui.PreviewImage(drawing, cls=cls))


class MoESampler(io.ComfyNode):
    """Latent in, latent out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoESampler",
            display_name="MoE Sampler",
            category=CATEGORY,
            description="Runs a plan: each step is one call of a model and one fused update. An expert is "
            "loaded when its part begins.",
            inputs=[
                Plan.Input("plan"),
                io.Latent.Input("latent_image"),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True),
                io.Combo.Input(
                    "noise",
                    options=[_COMFYS, _OWN],
                    default=_COMFYS,
                    tooltip="ComfyUI: what its own samplers start from. moe-sampler: what the package's "
                    "command and pipeline start from: each image of a batch has a seed, counted up.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.Latent.Output(
                    display_name="denoised", tooltip="What the last expert believed the image is."
                ),
            ],
        )

    @classmethod
    def execute(cls, plan: Any, latent_image: Any, seed: int, noise: str) -> io.NodeOutput:
        from .latents import sampled

        return io.NodeOutput(*sampled(plan, latent_image, seed, own_noise=noise == _OWN))


class MoEGuider(io.ComfyNode):
    """The routed experts for any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoEGuider",
            display_name="MoE Guider",
            category=CATEGORY,
            description="The routed experts as a GUIDER, for SamplerCustomAdvanced with any sampler and "
            "scheduler. Give the scheduler the first expert's model. Solvers, steps and shifts of the "
            "experts don't count here.",
            inputs=[Experts.Input("experts"), Router.Input("router", optional=True)],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(cls, experts: Any, router: Any = None) -> io.NodeOutput:
        from .guider import RoutedGuider

        return io.NodeOutput(RoutedGuider(experts, router))


class LoadSolLune(io.ComfyNode):
    """Sol and Lune as ComfyUI models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        import folder_paths

        files = [
            *folder_paths.get_filename_list("diffusion_models"),
            *folder_paths.get_filename_list("checkpoints"),
        ]
        return io.Schema(
            node_id="LoadSolLune",
            display_name="Load Sol/Lune",
            category=CATEGORY,
            description="Sol (v-prediction, linear betas) or Lune (rectified flow, shift 2) as a model that "
            "is sampled as it was trained. Text encoder and VAE are Stable Diffusion 1.5's.",
            inputs=[
                io.Combo.Input("expert", options=["sol", "lune"]),
                io.Combo.Input(
                    "file",
                    options=[_PUBLISHED, *dict.fromkeys(files)],
                    default=_PUBLISHED,
                    tooltip="Of models/diffusion_models or models/checkpoints: diffusers' or the original "
                    "names, or a trainer's .pt.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, expert: str, file: str) -> io.NodeOutput:
        import folder_paths

        from .sol_lune import load_expert

        if file == _PUBLISHED:
            return io.NodeOutput(load_expert(expert, PRESETS["sd15"].experts[expert]))
        folders = ("diffusion_models", "checkpoints")
        found = next(path for folder in folders if (path := folder_paths.get_full_path(folder, file)))
        return io.NodeOutput(load_expert(expert, found))


NODES = (MoEExpert, MoERouter, MoEPlan, MoESampler, MoEGuider, LoadSolLune)


class _Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI asks a custom node for."""
    return _Extension()
