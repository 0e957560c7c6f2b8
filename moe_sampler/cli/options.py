"""Options that several subcommands share, in groups; `commands.takes` gives a subcommand its groups.

A list that the library has, of solvers, presets or number formats, is read from there: the modules that know
them import nothing heavy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..loading.presets import PRESETS, TRAINING
from ..pipelines.choices import DTYPES, OFFLOADS, SPEEDS, any_of
from ..sampling.guiders import GUIDERS, PLAIN
from ..sampling.scheduler_names import KNOWN_NAMES
from ..sampling.solvers import SOLVERS
from ..sampling.spacing_names import SPACING_NAMES
from .routers import EXAMPLES

__all__ = [
    "EncoderOptions",
    "LoraOptions",
    "MachineOptions",
    "ModelOptions",
    "OutputOptions",
    "PipelineOptions",
    "ReadingOptions",
    "ReuseOptions",
    "RunOptions",
    "ScaleOptions",
    "SizeOptions",
    "SolverOptions",
    "SpeedOptions",
    "SteppingOptions",
    "given_flags",
    "option",
]

STEPS, GUIDANCE, MODEL, MACHINE, STUDENT = "Steps and solvers", "Guidance", "Model", "Machine", "Student"
SOURCE = "Images and captions"


def option(text: str, panel: str | None, *names: str, metavar: str | None = None) -> Any:
    """An option in a panel of --help; names where the field's own won't do."""
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar)


@dataclass(frozen=True)
class OutputOptions:
    """What is written, and how many."""

    output: Annotated[
        Path,
        option(
            "Image to write, .png, .jpg or .webp; several are numbered. A name that ends in .safetensors "
            "gets latents.",
            None,
            "--output",
            "-o",
            metavar="PATH",
        ),
    ] = Path("image.png")
    images: Annotated[int, option("Images per prompt.", None, "--images", "-n", metavar="N")] = 1
    seed: Annotated[
        int | None,
        option("Seed of the first image; the next ones count up. Default: 0.", None, metavar="N"),
    ] = None
    zoom: Annotated[
        int | None,
        option("Enlarge the written image. Default: small images to about 512 pixels.", None, metavar="N"),
    ] = None
    trace: Annotated[
        bool, option("Also write a contact sheet of every step, NAME.trace.png.", None, "--trace")
    ] = False
    animate: Annotated[
        bool, option("Also write the steps as an animation, NAME.webp.", None, "--animate")
    ] = False
    quiet: Annotated[bool, option("Print nothing but errors.", None, "--quiet", "-q")] = False
    like: Annotated[
        Path | None,
        option(
            "Take the settings of an image this command made; options given here override them.",
            None,
            metavar="PATH",
        ),
    ] = None
    trust: Annotated[
        bool,
        option("With --like: read the files and hub repositories that the image names.", None, "--trust"),
    ] = False
    plan: Annotated[
        Path | None,
        option(
            "Run this plan, a JSON file or - for standard input: it decides experts, steps, handoff, solvers "
            "and guidance.",
            None,
            metavar="PATH",
        ),
    ] = None


@dataclass(frozen=True)
class SizeOptions:
    """What is not wanted, and how large it is."""

    negative: Annotated[
        list[str] | None,
        option("Negative prompt, of all experts or of one.", None, metavar="TEXT|NAME=TEXT"),
    ] = None
    height: Annotated[int | None, option("In pixels. Default: the model's own.", None, metavar="N")] = None
    width: Annotated[int | None, option("In pixels. Default: the model's own.", None, metavar="N")] = None


@dataclass(frozen=True)
class StepOptions:
    """How many steps, and who takes them."""

    expert: Annotated[
        str | None, option("hybrid (all, the default), or one alone: sol, lune ...", STEPS, metavar="NAME")
    ] = None
    steps: Annotated[
        list[str] | None,
        option("Steps in all, shared out between the experts; or each one's.", STEPS, metavar="N|NAME=N"),
    ] = None
    sol_steps: Annotated[int | None, option("--steps sol=N.", STEPS, metavar="N")] = None
    lune_steps: Annotated[int | None, option("--steps lune=N.", STEPS, metavar="N")] = None
    router: Annotated[
        str | None,
        option(f"Instead of --handoff: {any_of(EXAMPLES)}.", STEPS, metavar="TEXT"),
    ] = None


@dataclass(frozen=True)
class SolverOptions:
    """How an expert steps."""

    solver: Annotated[
        list[str] | None,
        option(
            f"{any_of(SOLVERS)}; or diffusers' {', '.join(KNOWN_NAMES)} (also with _karras, _exponential or "
            "_beta), or a scheduler's class. Default: each expert's own.",
            STEPS,
            metavar="SOLVER|NAME=SOLVER",
        ),
    ] = None
    levels: Annotated[
        list[str] | None,
        option(
            f"Where the steps lie: {any_of(SPACING_NAMES)}; or the noise levels themselves, as in "
            "0.7,0.5,0.2. Default: timestep on DDPM paths, uniform on flows.",
            STEPS,
            metavar="SPACING|LEVEL,...|NAME=...",
        ),
    ] = None
    shift: Annotated[
        list[str] | None,
        option(
            "k of flow experts' shifted sigmas: above 1 stays longer at high noise.",
            STEPS,
            metavar="K|NAME=K",
        ),
    ] = None


@dataclass(frozen=True)
class ScaleOptions:
    """Each expert's classifier-free guidance."""

    guidance: Annotated[
        list[str] | None,
        option(
            "Guidance scale; 1 or less turns guidance off. Default: each expert's own.",
            GUIDANCE,
            metavar="SCALE|NAME=SCALE",
        ),
    ] = None


@dataclass(frozen=True)
class SteppingOptions(ScaleOptions, SolverOptions):
    """How the experts step, and hand over."""

    handoff: Annotated[
        list[float] | None,
        option(
            "Noise level where Sol hands over to Lune, between 0 (data) and 1 (noise). Once for each handoff "
            "of more experts.",
            STEPS,
            metavar="LEVEL",
        ),
    ] = None
    eta: Annotated[
        list[str] | None,
        option("ddim's share of fresh noise, 0 to 1.", STEPS, metavar="ETA|NAME=ETA"),
    ] = None
    sol_guidance: Annotated[float | None, option("--guidance sol=SCALE.", GUIDANCE, metavar="SCALE")] = None
    lune_guidance: Annotated[float | None, option("--guidance lune=SCALE.", GUIDANCE, metavar="SCALE")] = None
    guidance_window: Annotated[
        list[str] | None,
        option(
            "Guide only between these noise levels, as in 0.9:0.3.",
            GUIDANCE,
            metavar="HIGH:LOW|NAME=HIGH:LOW",
        ),
    ] = None
    guidance_rescale: Annotated[
        list[str] | None,
        option(
            "Share of the guided prediction that is scaled back to the unguided contrast, 0 to 1.",
            GUIDANCE,
            metavar="PHI|NAME=PHI",
        ),
    ] = None
    guider: Annotated[
        list[str] | None,
        option(
            f"How the guidance is made: {any_of((PLAIN, *GUIDERS))}, with settings in words, as in "
            '"apg eta 0.5 norm_threshold 5 momentum -0.5" or "cfg_zero_star zero_init_steps 1".',
            GUIDANCE,
            metavar="GUIDER|NAME=GUIDER",
        ),
    ] = None


@dataclass(frozen=True)
class ReuseOptions:
    """What a run costs."""

    reuse: Annotated[
        list[str] | None,
        option(
            "Full passes through a model: every K-th, the others reuse its deep features at a tenth of the "
            "cost; or each one's number from 0, as in 0,3,5; or every K-th down to a noise level, as in "
            "0.5:2,0:4; or auto, every third of ten steps or more. Default: all; with --speed, auto.",
            STEPS,
            metavar="K|N,N...|LEVEL:K,...|auto|NAME=...",
        ),
    ] = None
    budget: Annotated[
        float | None,
        option(
            "What an image may cost, in full passes through a model (a guided step takes two): chooses how "
            "many of the steps are taken and which reuse features.",
            STEPS,
            metavar="PASSES",
        ),
    ] = None


@dataclass(frozen=True)
class RunOptions(ReuseOptions, SteppingOptions, StepOptions):
    """All that a plan is made of."""


def _preset(name: str) -> str:
    known = PRESETS[name]
    return f"{name}, {known.base} with {' and '.join(known.experts)}"


@dataclass(frozen=True)
class ModelOptions:
    """Where the model is."""

    model: Annotated[
        str | None,
        option(
            "Folder or hub id: of experts (unet_sol/, unet_lune/ ...), or of a Stable Diffusion base for "
            "--sol and the like. Default: demo, the tiny experts in the package.",
            MODEL,
            metavar="FOLDER|ID",
        ),
    ] = None
    preset: Annotated[
        str | None,
        option(
            f"A model by name: {any_of(map(_preset, PRESETS))}.",
            MODEL,
            metavar="NAME",
        ),
    ] = None
    sol: Annotated[
        str | None,
        option(
            "Sol's weights: a folder, a .safetensors or .pt file, owner/name or owner/name:file.",
            MODEL,
            metavar="SOURCE",
        ),
    ] = None
    lune: Annotated[str | None, option("Lune's weights.", MODEL, metavar="SOURCE")] = None
    sd15: Annotated[
        str | None, option("A Stable Diffusion 1.5 UNet as an expert.", MODEL, metavar="SOURCE")
    ] = None
    expert_source: Annotated[
        list[str] | None, option("An expert by any name.", MODEL, metavar="NAME=SOURCE")
    ] = None
    expert_training: Annotated[
        list[str] | None,
        option(
            f"How it was trained: as {any_of(TRAINING)}, or a scheduler_config.json.",
            MODEL,
            metavar="NAME=KIND|FILE",
        ),
    ] = None
    variant: Annotated[
        str | None, option("Prefer files of this variant, such as fp16.", MODEL, metavar="NAME")
    ] = None
    revision: Annotated[
        list[str] | None,
        option("Of the base on the hub, or of an expert.", MODEL, metavar="REV|NAME=REV"),
    ] = None
    subfolder: Annotated[
        list[str] | None,
        option("Of the base's folder or repository, or of an expert's.", MODEL, metavar="DIR|NAME=DIR"),
    ] = None
    local_files_only: Annotated[
        bool, option("Download nothing from the hub.", MODEL, "--local-files-only")
    ] = False


@dataclass(frozen=True)
class MachineOptions:
    """What computes, and in which number format."""

    device: Annotated[
        str | None,
        option("cpu, cuda, cuda:1 ... Default: CUDA where it is.", MACHINE, metavar="DEVICE"),
    ] = None
    dtype: Annotated[
        str | None,
        option(
            f"{any_of((*DTYPES, 'auto'))}, what the device computes fastest in. Default: float16 on CUDA, "
            "else float32.",
            MACHINE,
            metavar="TYPE",
        ),
    ] = None
    offload: Annotated[
        str,
        option(
            "expert: one expert in memory at a time. model: one component at a time on the GPU.",
            MACHINE,
            metavar="|".join(OFFLOADS),
        ),
    ] = "none"
    batch_size: Annotated[
        int | None, option("Images sampled at once. Default: all.", MACHINE, metavar="N")
    ] = None


@dataclass(frozen=True)
class LoraOptions:
    """Adapters."""

    lora: Annotated[
        list[str] | None,
        option(
            "A LoRA for one expert, with a scale if wanted: sol=style.safetensors@0.8.",
            MODEL,
            metavar="NAME=PATH[@SCALE]",
        ),
    ] = None
    lora_text_encoder: Annotated[
        bool | None,
        option(
            "Whether to use a LoRA's text encoder part, which acts on all experts.",
            MODEL,
            "--lora-text-encoder/--no-lora-text-encoder",
        ),
    ] = None


@dataclass(frozen=True)
class SpeedOptions:
    """What makes the models faster."""

    speed: Annotated[
        str | None,
        option(
            "fast: --dtype auto, weights laid out as they are read, an attention's projections in one, and "
            "--reuse auto. max: UNets and the VAE's decoder also compiled, which takes minutes before the "
            "first image of a size. Default: none.",
            MACHINE,
            metavar="|".join(SPEEDS),
        ),
    ] = None


@dataclass(frozen=True)
class PipelineOptions(SpeedOptions, MachineOptions, LoraOptions, ModelOptions):
    """All that the pipeline is loaded with."""


@dataclass(frozen=True)
class EncoderOptions:
    """What a student sees and reads with."""

    encoders: Annotated[
        str | None,
        option(
            "A pipeline with the student's VAE and text encoders (Flux's, Stable Diffusion's). Default: the "
            "experts' own.",
            STUDENT,
            metavar="FOLDER|ID",
        ),
    ] = None
    vae: Annotated[str | None, option("Another VAE.", STUDENT, metavar="FOLDER|ID")] = None
    clip: Annotated[str | None, option("Another CLIP text encoder.", STUDENT, metavar="FOLDER|ID")] = None
    t5: Annotated[
        str | None, option("T5 encoder. Default: --encoders' own, or none.", STUDENT, metavar="FOLDER|ID")
    ] = None
    t5_length: Annotated[int | None, option("Tokens of T5. Default: 128.", STUDENT, metavar="N")] = None


@dataclass(frozen=True)
class ReadingOptions:
    """How images and captions are read."""

    caption_fields: Annotated[
        list[str] | None,
        option(
            "Where captions stand: a column, text (.txt files), filename. Of several, each image gets "
            "one, drawn.",
            SOURCE,
            "--caption-field",
            metavar="NAME",
        ),
    ] = None
    captions_per_image: Annotated[
        int | None,
        option("Samples of each image, with another caption each while there are any.", SOURCE, metavar="N"),
    ] = None
    masks: Annotated[
        Path | None,
        option(
            "Folder of masks by the images' names, for background_weight: white counts.",
            SOURCE,
            metavar="FOLDER",
        ),
    ] = None
    mask_field: Annotated[str | None, option("Column of masks.", SOURCE, metavar="NAME")] = None
    image_field: Annotated[
        str | None, option("Column of the pictures. Default: the only one.", SOURCE, metavar="NAME")
    ] = None
    split: Annotated[str | None, option("Of a hub data set. Default: train.", SOURCE, metavar="NAME")] = None
    subset: Annotated[str | None, option("Of a hub data set.", SOURCE, metavar="NAME")] = None
    data_revision: Annotated[str | None, option("Of a hub data set.", SOURCE, metavar="NAME")] = None
    streaming: Annotated[
        bool, option("Read a data set as it comes, without a copy of it on the disk.", SOURCE, "--streaming")
    ] = False

    def given(self) -> dict[str, Any]:
        """What was asked for, as `Reading` has it."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found["revision"] = found.pop("data_revision")  # --revision is the models'
        found["caption_fields"] = tuple(found["caption_fields"] or ()) or None
        return {name: value for name, value in found.items() if value}


def given_flags(options: Any) -> list[str]:
    """Those of a group's options that were given, as they are typed."""
    fields = [field.name for field in dataclasses.fields(options) if getattr(options, field.name) is not None]
    return [f"--{name.replace('_', '-')}" for name in fields]
