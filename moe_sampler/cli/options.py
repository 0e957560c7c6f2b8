"""Options that several subcommands share, in groups, and how a subcommand takes them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer

__all__ = [
    "ExpertOptions",
    "GuidanceOptions",
    "LoraOptions",
    "MachineOptions",
    "ModelOptions",
    "StepOptions",
    "one_line_errors",
    "takes",
]

STEPS, GUIDANCE, MODEL, MACHINE = "Steps and solvers", "Guidance", "Model", "Machine"


def _option(text: str, panel: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar)


@dataclass(frozen=True)
class StepOptions:
    """How many steps, and who takes them."""

    expert: Annotated[
        str | None, _option("hybrid (all, the default), or one alone: sol, lune ...", STEPS, metavar="NAME")
    ] = None
    steps: Annotated[
        list[str] | None,
        _option("Steps in all, shared out between the experts; or each one's.", STEPS, metavar="N|NAME=N"),
    ] = None
    sol_steps: Annotated[int | None, _option("Sol's steps; together with --lune-steps.", STEPS)] = None
    lune_steps: Annotated[int | None, _option("Lune's steps.", STEPS)] = None
    router: Annotated[
        str | None,
        _option(
            'Instead of --handoff: "crossfade 0.95 0.8", "spans sol 0.9 lune 0", "steps sol 4 lune 8".',
            STEPS,
            metavar="TEXT",
        ),
    ] = None


@dataclass(frozen=True)
class ExpertOptions:
    """How the experts step."""

    handoff: Annotated[
        list[float] | None,
        _option(
            "Noise level where Sol hands over to Lune, between 0 (data) and 1 (noise). Once for each handoff "
            "of more experts.",
            STEPS,
            metavar="LEVEL",
        ),
    ] = None
    solver: Annotated[
        list[str] | None,
        _option(
            "ddpm, ddim, euler, heun, dpmpp_2m or dpmpp_2m_sde. Default: each expert's own.",
            STEPS,
            metavar="SOLVER|NAME=SOLVER",
        ),
    ] = None
    shift: Annotated[
        list[str] | None,
        _option(
            "k of flow experts' shifted sigmas: above 1 stays longer at high noise.",
            STEPS,
            metavar="K|NAME=K",
        ),
    ] = None
    eta: Annotated[
        list[str] | None,
        _option("ddim's share of fresh noise, 0 to 1.", STEPS, metavar="ETA|NAME=ETA"),
    ] = None


@dataclass(frozen=True)
class GuidanceOptions:
    """Each expert's classifier-free guidance."""

    guidance: Annotated[
        list[str] | None,
        _option("Guidance scale; 1 turns guidance off.", GUIDANCE, metavar="SCALE|NAME=SCALE"),
    ] = None
    sol_guidance: Annotated[float | None, _option("Guidance scale of Sol alone.", GUIDANCE)] = None
    lune_guidance: Annotated[float | None, _option("Guidance scale of Lune alone.", GUIDANCE)] = None
    guidance_window: Annotated[
        list[str] | None,
        _option(
            "Guide only between these noise levels, as in 0.9:0.3.",
            GUIDANCE,
            metavar="HIGH:LOW|NAME=HIGH:LOW",
        ),
    ] = None
    guidance_rescale: Annotated[
        list[str] | None,
        _option(
            "Share of the guided prediction that is scaled back to the unguided contrast, 0 to 1.",
            GUIDANCE,
            metavar="PHI|NAME=PHI",
        ),
    ] = None


@dataclass(frozen=True)
class ModelOptions:
    """Where the model is."""

    model: Annotated[
        str | None,
        _option(
            "Folder or hub id: of experts (unet_sol/, unet_lune/ ...), or of a Stable Diffusion base for "
            "--sol and the like. Default: demo, the tiny experts in the package.",
            MODEL,
            metavar="FOLDER|ID",
        ),
    ] = None
    preset: Annotated[
        str | None,
        _option(
            "A model by name: sd15, Stable Diffusion 1.5 with the published Sol and Lune.",
            MODEL,
            metavar="NAME",
        ),
    ] = None
    sol: Annotated[
        str | None,
        _option(
            "Sol's weights: a folder, a .safetensors or .pt file, owner/name or owner/name:file.",
            MODEL,
            metavar="SOURCE",
        ),
    ] = None
    lune: Annotated[str | None, _option("Lune's weights.", MODEL, metavar="SOURCE")] = None
    sd15: Annotated[
        str | None, _option("A Stable Diffusion 1.5 UNet as an expert.", MODEL, metavar="SOURCE")
    ] = None
    expert_source: Annotated[
        list[str] | None, _option("An expert by any name.", MODEL, metavar="NAME=SOURCE")
    ] = None
    expert_training: Annotated[
        list[str] | None,
        _option(
            "How it was trained: as sol, lune or sd15, or a scheduler_config.json.",
            MODEL,
            metavar="NAME=KIND|FILE",
        ),
    ] = None
    variant: Annotated[
        str | None, _option("Prefer files of this variant, such as fp16.", MODEL, metavar="NAME")
    ] = None
    revision: Annotated[
        list[str] | None,
        _option("Of the base on the hub, or of an expert.", MODEL, metavar="REV|NAME=REV"),
    ] = None
    local_files_only: Annotated[
        bool, _option("Download nothing from the hub.", MODEL, "--local-files-only")
    ] = False


@dataclass(frozen=True)
class MachineOptions:
    """What computes, and in which number format."""

    device: Annotated[
        str | None,
        _option("cpu, cuda, cuda:1 ... Default: CUDA where it is.", MACHINE, metavar="DEVICE"),
    ] = None
    dtype: Annotated[
        str | None,
        _option(
            "float32, float16 or bfloat16. Default: float16 on CUDA, else float32.", MACHINE, metavar="TYPE"
        ),
    ] = None
    offload: Annotated[
        str,
        _option(
            "expert: one expert in memory at a time. model: one component at a time on the GPU.",
            MACHINE,
            metavar="none|expert|model",
        ),
    ] = "none"
    batch_size: Annotated[
        int | None, _option("Images sampled at once. Default: all.", MACHINE, metavar="N")
    ] = None


@dataclass(frozen=True)
class LoraOptions:
    """Adapters."""

    lora: Annotated[
        list[str] | None,
        _option(
            "A LoRA for one expert, with a scale if wanted: sol=style.safetensors@0.8.",
            MODEL,
            metavar="NAME=PATH[@SCALE]",
        ),
    ] = None
    lora_text_encoder: Annotated[
        bool | None,
        _option(
            "Whether to use a LoRA's text encoder part, which acts on all experts.",
            MODEL,
            "--lora-text-encoder/--no-lora-text-encoder",
        ),
    ] = None


def takes(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with the options of these groups, each of which it gets as one object by its keyword."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = inspect.signature(function).parameters.values()
        parameters = [p.replace(annotation=hints[p.name]) for p in own if p.name not in groups]
        for cls in groups.values():
            hints = get_type_hints(cls, include_extras=True)
            parameters += [
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=field.default,
                    annotation=hints[field.name],
                )
                for field in dataclasses.fields(cls)
            ]

        def command(**given: Any) -> None:
            for name, cls in groups.items():
                given[name] = cls(**{field.name: given.pop(field.name) for field in dataclasses.fields(cls)})
            with one_line_errors():
                function(**given)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Wrong input ends with one clear line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.secho(f"error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None
