"""The `moe-sampler` command. Heavy imports wait until a command needs them, so that --help is quick."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="moe-sampler",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="""Diffusion experts of different parametrizations make one image together.

**Sol** (v-prediction) lays the image out in the early, noisy steps; **Lune** (rectified flow) paints it in
the later ones. A run is planned before it starts; `moe-sampler plan` shows the plan.""",
)


Model = Annotated[
    Path | None,
    typer.Option(
        help="Pipeline folder with unet_sol/ and unet_lune/. Default: the demo experts in the package."
    ),
]
Expert = Annotated[str | None, typer.Option(help="hybrid (both, the default), or sol or lune alone.")]
Steps = Annotated[int | None, typer.Option(help="Steps in all, shared out between the experts.")]
SolSteps = Annotated[int | None, typer.Option(help="Sol's steps; with --lune-steps, instead of --steps.")]
LuneSteps = Annotated[int | None, typer.Option(help="Lune's steps.")]
Handoff = Annotated[
    float | None,
    typer.Option(help="Noise level where Sol hands over to Lune, between 0 (data) and 1 (noise)."),
]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale of both experts; 1 turns guidance off.")]
SolGuidance = Annotated[float | None, typer.Option(help="Guidance scale of Sol alone.")]
LuneGuidance = Annotated[float | None, typer.Option(help="Guidance scale of Lune alone.")]
Shift = Annotated[
    float | None, typer.Option(help="k of Lune's shifted sigmas: above 1 stays longer at high noise.")
]
Solver = Annotated[
    str | None, typer.Option(help="ddpm, ddim, euler or dpmpp_2m, for both experts. Default: each one's own.")
]
_CALL_SETTINGS = (
    *("negative_prompt", "seed", "expert", "num_inference_steps", "sol_steps", "lune_steps", "handoff"),
    *("sol_guidance", "lune_guidance", "shift", "solver", "height", "width"),
)
"""What an image's settings say of the pipeline's call."""


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Wrong input ends with one clear line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.secho(f"error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None


def _version(value: bool) -> None:
    if value:
        from . import __version__

        typer.echo(f"moe-sampler {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _folder(model: Path | None) -> Path:
    from .demo import experts_path

    return experts_path() if model is None else model


def _quiet() -> None:
    """Leave the terminal to our own progress bar."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _given(guidance: float | None, **options: Any) -> dict[str, Any]:
    """The options that were given; `guidance` stands for each expert's own where that wasn't."""
    for name in ("sol_guidance", "lune_guidance"):
        options[name] = guidance if options[name] is None else options[name]
    return {key: value for key, value in options.items() if value is not None}


def _output_paths(output: Path, count: int) -> list[Path]:
    """One name as it is given; several numbered from 1."""
    from .images import check_writable

    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i + 1}") for i in range(count)]
    for path in paths:
        check_writable(path)
    return paths


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or several prompts.", show_default=False)
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PNG to write; several images are numbered.")
    ] = Path("image.png"),
    images: Annotated[int, typer.Option("--images", "-n", help="Images per prompt.")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the first image; the next ones count up. Default: 0."),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    model: Model = None,
    expert: Expert = None,
    steps: Steps = None,
    sol_steps: SolSteps = None,
    lune_steps: LuneSteps = None,
    handoff: Handoff = None,
    guidance: Guidance = None,
    sol_guidance: SolGuidance = None,
    lune_guidance: LuneGuidance = None,
    shift: Shift = None,
    solver: Solver = None,
    height: Annotated[int | None, typer.Option(help="In pixels. Default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels. Default: the model's.")] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also write a contact sheet of every step, NAME.trace.png.")
    ] = False,
    zoom: Annotated[
        int | None, typer.Option(help="Enlarge the written image. Default: small images to about 512 pixels.")
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Take the settings of an image made before; options given here override them."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: CUDA where it is.")
    ] = None,
) -> None:
    """Make images.

    `moe-sampler generate "a castle with two towers, at dusk" -o castle.png`

    `moe-sampler generate "a portrait" "a city street at night" -n 3 --seed 7 -o pictures.png`

    The settings are in each PNG's metadata, so `moe-sampler generate --like castle.png -o again.png` makes it
    again.
    """
    with _one_line_errors():
        from .images import read_settings, save_png
        from .images import zoom as enlarge

        given = _given(
            guidance,
            negative_prompt=negative,
            seed=seed,
            expert=expert,
            num_inference_steps=steps,
            sol_steps=sol_steps,
            lune_steps=lune_steps,
            handoff=handoff,
            sol_guidance=sol_guidance,
            lune_guidance=lune_guidance,
            shift=shift,
            solver=solver,
            height=height,
            width=width,
        )
        settings = read_settings(like) if like is not None else {}
        prompts = prompts or ([settings["prompt"]] if like is not None else [])
        if not prompts:
            raise ValueError("give a prompt, or --like IMAGE")
        if model is None and settings.get("model") is not None:
            model = Path(settings["model"])
        call = {key: settings[key] for key in _CALL_SETTINGS if key in settings}
        zoom = settings.get("zoom") if zoom is None else zoom
        if steps is not None or sol_steps is not None or lune_steps is not None:
            for key in ("num_inference_steps", "sol_steps", "lune_steps"):
                call.pop(key, None)
        if expert not in (None, "hybrid"):
            call.pop("handoff", None)
        call.update(given)
        call.setdefault("seed", 0)
        if images < 1:
            raise ValueError(f"images per prompt must be at least 1, got {images}")
        if zoom is not None and zoom < 1:
            raise ValueError(f"zoom must be at least 1, got {zoom}")
        # What is wrong with the settings or the folder shows before any weights are read.
        _compile(_folder(model), call)
        paths = _output_paths(output, len(prompts) * images)
        sheets = _output_paths(output.with_suffix(".trace.png"), len(paths)) if trace else []
        pipe = _load(model, device)
        watch = _trace(call) if trace else None
        result = pipe(prompt=prompts, num_images_per_prompt=images, **call)
        for index, (image, path) in enumerate(zip(result.images, paths, strict=True)):
            factor = zoom or max(1, round(512 / max(image.size)))
            record = _record(pipe, call, prompts[index // images], result.seeds[index], model) | {
                "zoom": factor
            }
            save_png(enlarge(image, factor), path, record)
            typer.echo(str(path))
            if watch is not None:
                title = f'"{record["prompt"]}", seed {record["seed"]}'
                save_png(watch.sheet(pipe, result.plan, index, title=title), sheets[index], record)
                typer.echo(str(sheets[index]))


def _load(model: Path | None, device: str | None) -> Any:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f'"{device}" is not a device: use cpu, cuda or cuda:N') from None
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("CUDA is not available here: use --device cpu")
    # Importing diffusers makes very many objects and no garbage: collecting meanwhile costs a second.
    gc.disable()
    from .pipeline import HybridPipeline

    gc.enable()
    _quiet()
    dtype = torch.float16 if wanted.type == "cuda" else torch.float32
    return HybridPipeline.from_pretrained(_folder(model), dtype=dtype).to(wanted)


def _compile(folder: Path, settings: dict[str, Any]) -> Any:
    """The plan for `settings`, from the folder's configs alone."""
    from .checkpoints import read_config, read_model_index
    from .hybrid import DEFAULTS, EXPERTS, hybrid_experts, hybrid_plan

    index = read_model_index(folder)
    configs = {name: read_config(folder / f"scheduler_{name}" / "scheduler_config.json") for name in EXPERTS}
    defaults = {key: index.get(key, value) for key, value in DEFAULTS.items()}
    guidance = {name: settings.get(f"{name}_guidance", defaults[f"{name}_guidance"]) for name in EXPERTS}
    experts = hybrid_experts(configs, guidance, shift=settings.get("shift"), solver=settings.get("solver"))
    keys = ("expert", "num_inference_steps", "sol_steps", "lune_steps", "handoff")
    return hybrid_plan(experts, defaults, **{key: settings[key] for key in keys if key in settings})


def _trace(call: dict[str, Any]) -> Any:
    from .trace import Trace

    watch = Trace()
    call["callback_on_step_end"] = watch
    call["callback_on_step_end_tensor_inputs"] = watch.tensor_inputs
    return watch


def _record(pipe: Any, call: dict[str, Any], prompt: str, seed: int, model: Path | None) -> dict[str, Any]:
    """Everything needed to make one image again, also when the model's defaults change."""
    from . import __version__

    record = {key: value for key, value in call.items() if not key.startswith("callback")}
    record |= {
        "prompt": prompt,
        "seed": seed,
        "version": __version__,
        "model": model and str(model.resolve()),
    }
    own_steps = {"sol_steps", "lune_steps"} & set(call)
    defaults = [] if own_steps else ["num_inference_steps"]
    defaults += ["sol_guidance", "lune_guidance"]
    defaults += ["handoff"] if call.get("expert", "hybrid") == "hybrid" else []
    return {**{key: pipe.config[key] for key in defaults}, **record}


@app.command()
def plan(
    model: Model = None,
    expert: Expert = None,
    steps: Steps = None,
    sol_steps: SolSteps = None,
    lune_steps: LuneSteps = None,
    handoff: Handoff = None,
    guidance: Guidance = None,
    sol_guidance: SolGuidance = None,
    lune_guidance: LuneGuidance = None,
    shift: Shift = None,
    solver: Solver = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
) -> None:
    """Print the table a run would follow: who works at which noise level, and how.

    `moe-sampler plan --handoff 0.7 --steps 20`
    """
    with _one_line_errors():
        settings = _given(
            guidance,
            expert=expert,
            num_inference_steps=steps,
            sol_steps=sol_steps,
            lune_steps=lune_steps,
            handoff=handoff,
            sol_guidance=sol_guidance,
            lune_guidance=lune_guidance,
            shift=shift,
            solver=solver,
        )
        compiled = _compile(_folder(model), settings)
        typer.echo(compiled.to_json(indent=2) if as_json else str(compiled))


@app.command()
def train_demo(
    output: Annotated[Path, typer.Argument(help="Folder to write the trained experts to.")],
    work_dir: Annotated[
        Path, typer.Option(help="Folder for the rendered scenes, checkpoints and logs; kept for resuming.")
    ] = Path("runs/demo"),
    stage: Annotated[str, typer.Option(help="One stage by name, or all.")] = "all",
    seed: Annotated[int, typer.Option(help="Seed of data, weights and training.")] = 0,
) -> None:
    """Draw the scenes and train the demo experts: about two hours on two cores.

    Called again with the same arguments it continues where it stopped.
    """
    with _one_line_errors():
        from .demo.train import train_demo as train

        try:
            typer.echo(str(train(output, work_dir=work_dir, stage=stage, seed=seed)))
        except RuntimeError as error:  # a stage that failed, or a folder in use: it says which
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from None


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
