"""`moe-sampler generate`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .models import Lora, Machine, Model, merge_models
from .options import (
    ExpertOptions,
    GuidanceOptions,
    LoraOptions,
    MachineOptions,
    ModelOptions,
    StepOptions,
    takes,
)
from .outputs import Files, Watch
from .settings import ByExpert, call_of, compile_plan, merge_runs, record_defaults

__all__ = ["generate"]

_KEPT = ("seed", "height", "width", "strength", "zoom")


@takes(
    run=StepOptions,
    experts=ExpertOptions,
    guidance=GuidanceOptions,
    where=ModelOptions,
    lora=LoraOptions,
    machine=MachineOptions,
)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or several prompts.", show_default=False)
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="PNG to write; several images are numbered. A name that ends in .safetensors gets latents.",
            metavar="PATH",
        ),
    ] = Path("image.png"),
    images: Annotated[int, typer.Option("--images", "-n", help="Images per prompt.", metavar="N")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the first image; the next ones count up. Default: 0.", metavar="N"),
    ] = None,
    negative: Annotated[
        list[str] | None,
        typer.Option(help="Negative prompt, of all experts or of one.", metavar="TEXT|NAME=TEXT"),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Start from this image instead of from noise.", metavar="PATH")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="With --image: how much is changed: the share of the steps that are run. Default: 0.8.",
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(help="In pixels. Default: the model's own, in --image's proportions.", metavar="N"),
    ] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", metavar="N")] = None,
    zoom: Annotated[
        int | None,
        typer.Option(
            help="Enlarge the written image. Default: small images to about 512 pixels.", metavar="N"
        ),
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also write a contact sheet of every step, NAME.trace.png.")
    ] = False,
    animate: Annotated[
        bool, typer.Option("--animate", help="Also write the steps as an animation, NAME.webp.")
    ] = False,
    like: Annotated[
        Path | None,
        typer.Option(
            help="Take the settings of an image made before; options given here override them.",
            metavar="PATH",
        ),
    ] = None,
    *,
    run: StepOptions,
    experts: ExpertOptions,
    guidance: GuidanceOptions,
    where: ModelOptions,
    lora: LoraOptions,
    machine: MachineOptions,
) -> None:
    """Make images.

    `moe-sampler generate "a castle with two towers, at dusk" -o castle.png`

    `moe-sampler generate "a portrait" "a city street at night" -n 3 --seed 7 -o pictures.png`

    The settings are in each PNG's metadata, so `moe-sampler generate --like castle.png -o again.png` makes it
    again. VALUE|NAME=VALUE options may be repeated: `--guidance 5 --guidance lune=3`.
    """
    from ..viewing.images import read_settings

    # What is wrong with the settings, the folder or the machine shows before any weights are read.
    previous = read_settings(like) if like is not None else {}
    prompts = prompts or ([previous["prompt"]] if "prompt" in previous else [])
    if "student" in previous:
        raise ValueError(f"{like} was made by a student: use `moe-sampler tinyflux sample --like`")
    if not prompts:
        raise ValueError(
            "give a prompt" + (", which this image has none of" if like else ", or --like IMAGE")
        )
    if images < 1:
        raise ValueError(f"images per prompt must be at least 1, got {images}")
    model = Model(merge_models(previous, where), where.local_files_only)
    configs, defaults = model.training()
    names = list(configs)
    settings = merge_runs(previous, run, experts, guidance, names)
    options = dict(seed=seed, height=height, width=width, strength=strength, zoom=zoom)
    settings |= {key: previous[key] for key in _KEPT if previous.get(key) is not None}
    settings |= {key: value for key, value in options.items() if value is not None}
    settings.setdefault("seed", 0)
    negatives = ByExpert.read("--negative", negative, known=names).over(
        previous.get("negative_prompt"), names
    )
    settings |= {"negative_prompt": negatives} if negatives is not None else {}
    start = _start_image(settings, previous, image)
    if settings.get("zoom", 1) < 1:
        raise ValueError(f"zoom must be at least 1, got {settings['zoom']}")
    loras, text_encoder = _loras(previous, lora, names)
    if loras:
        settings |= {"loras": [[each.expert, each.path, each.scale] for each in loras]}
        settings |= {} if text_encoder is None else {"lora_text_encoder": text_encoder}
    call = call_of(settings, names)
    latents = output.suffix == ".safetensors"
    if latents and (trace or animate):
        raise ValueError("--trace and --animate go with images: give a name that ends in .png")
    compile_plan(configs, defaults, call)
    files = Files(output, len(prompts) * images, trace, animate)
    computer = Machine.read(machine, previous)
    if start is not None or "height" in call or "width" in call:
        settings |= _size(model, settings, start)
        call |= {key: settings[key] for key in ("height", "width") if key in settings}

    pipe = model.load(computer, loras, text_encoder)
    watch = Watch(len(prompts) * images, machine.batch_size) if trace or animate else None
    if watch is not None:
        call |= {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": watch.tensor_inputs}
    result = pipe(
        prompt=prompts,
        num_images_per_prompt=images,
        image=start,
        batch_size=machine.batch_size,
        output_type="latent" if latents else "pil",
        **call,
    )
    record = record_defaults(settings, defaults, names) | model.settings | {"dtype": computer.dtype}
    for index in range(len(result.images)):
        own = {"prompt": prompts[index // images], "seed": result.seeds[index]}
        files.write(pipe, result, index, record | own, watch)


def _start_image(settings: dict[str, Any], previous: Mapping[str, Any], image: Path | None) -> Any:
    """The PIL image to start from, its place noted in `settings`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    from ..pipelines.checks import check_strength

    kept = image is None and previous.get("image") is not None
    path = Path(previous["image"]) if kept else image
    if path is None:
        check_strength(settings.get("strength"), None, None)
        return None
    try:
        content = path.read_bytes()
        opened = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    digest = hashlib.sha256(content).hexdigest()
    if kept and digest != previous["image_sha256"]:
        raise ValueError(f"{path} is no longer the image that was started from: give --image")
    settings |= {"image": str(path.resolve()), "image_sha256": digest}
    settings["strength"] = check_strength(settings.get("strength"), opened, None)
    return opened


def _loras(
    previous: Mapping[str, Any], options: LoraOptions, names: Sequence[str]
) -> tuple[list[Lora], bool | None]:
    loras = [Lora.read(text) for text in options.lora or ()]
    if not loras:
        loras = [Lora(*each) for each in previous.get("loras", ())]
    text_encoder = options.lora_text_encoder
    text_encoder = previous.get("lora_text_encoder") if text_encoder is None else text_encoder
    for each in loras:
        each.check(names, text_encoder)
    return loras, text_encoder


def _size(model: Model, settings: Mapping[str, Any], start: Any) -> dict[str, int]:
    """Height and width as far as they are known: what was given, or the start's proportions in about the size
    the model was made for, so that any photo fits."""
    from ..pipelines.checks import check_size

    side, multiple = model.sizes()
    size = {key: settings[key] for key in ("height", "width") if key in settings}
    if start is not None:
        scale = side / math.sqrt(start.height * start.width)
        scale = next((size[key] / getattr(start, key) for key in size), scale)
        for key in {"height", "width"} - size.keys():
            size[key] = max(1, round(getattr(start, key) * scale / multiple)) * multiple
    check_size(size.get("height", multiple), size.get("width", multiple), multiple)
    return size
