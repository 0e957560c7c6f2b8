"""`moe-sampler tinyflux ...`. Heavy imports wait until a command needs them, so that --help is quick."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..pipelines.choices import CONVENTIONS, DTYPES, any_of, check_choice, conventions_help
from .commands import command_group, one_line_errors, takes
from .machine import check_device, quiet
from .options import EncoderOptions
from .student_sample import sample
from .student_train import train

if TYPE_CHECKING:
    from moe_sampler.tinyflux.features.cache_build import Teachers
    from moe_sampler.tinyflux.features.encoders import StudentEncoders
    from moe_sampler.tinyflux.features.extraction import Convention

__all__ = ["app"]

app = command_group(
    "tinyflux",
    "The student: caches of what Sol and Lune teach it, its training, its images, and upstream's files.",
)
app.command("train")(train)
app.command()(sample)

_TEACHERS = {"sol": ("sol",), "lune": ("lune",), "both": ("sol", "lune"), "none": ()}

Folder = Annotated[Path, typer.Argument(help="Folder of the cache.")]
Demo = Annotated[
    bool, typer.Option("--demo", help="The demo's scenes and experts, instead of SOURCE and --experts.")
]


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("samples", total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=total > 0)


@app.command()
@takes(encoders=EncoderOptions)
def cache(
    folder: Folder,
    source: Annotated[
        Path | None,
        typer.Argument(
            help="Images and captions: a folder (a.png + a.txt, metadata.jsonl or metadata.csv), a .tar, or "
            "a folder of WebDataset .tar files.",
            show_default=False,
        ),
    ] = None,
    demo: Demo = False,
    count: Annotated[int, typer.Option(help="With --demo: how many scenes.")] = 256,
    experts: Annotated[
        Path | None,
        typer.Option(help="Pipeline folder with unet_sol/ and unet_lune/. Default: the demo experts."),
    ] = None,
    teachers: Annotated[str, typer.Option(help=f"{any_of(_TEACHERS)}.")] = "both",
    size: Annotated[
        str | None,
        typer.Option(
            help="512, or height x width as 512x768: images are resized and cut. Default: the experts'."
        ),
    ] = None,
    buckets: Annotated[
        str | None,
        typer.Option(help="Times of the features, as 0.1,0.5,0.9; 1 is data. Default: 0.05, 0.15 ... 0.95."),
    ] = None,
    convention: Annotated[
        str, typer.Option(help=f"How features are extracted. {conventions_help()}.")
    ] = CONVENTIONS[0],
    maps: Annotated[
        str | None,
        typer.Option(
            help="Also keep a block's feature maps, for alignment, at these times, as 0.75 or 0.5,0.75.",
            show_default=False,
        ),
    ] = None,
    map_block: Annotated[
        str | None, typer.Option(help="Of --maps: mid_block, up_blocks.0 ... Default: the middle.")
    ] = None,
    map_expert: Annotated[str, typer.Option(help="Of --maps: sol or lune.")] = "lune",
    seed: Annotated[int, typer.Option(help="Sample i's noise has seed + i.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"On disk: {any_of(DTYPES)}.")] = "float16",
    shard_size: Annotated[int, typer.Option(help="Samples a file.")] = 256,
    micro_batch: Annotated[int, typer.Option(help="Samples computed together.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... Default: CUDA where it is.")] = None,
    *,
    encoders: EncoderOptions,
) -> None:
    """Encode images and captions, and extract what the experts teach about them.

    `moe-sampler tinyflux cache runs/cache --demo`

    Stopped, it continues when called again with the same arguments. Several processes:

    `accelerate launch --num_processes 4 -m moe_sampler.cli tinyflux cache runs/cache pictures/`
    """
    if (source is None) != demo:
        raise ValueError("give a SOURCE of images and captions, or --demo")
    check_choice("--teachers", teachers, _TEACHERS)
    check_choice("--convention", convention, CONVENTIONS)
    check_choice("--dtype", dtype, DTYPES)
    times = None if buckets is None else _numbers(buckets)
    map_times = None if maps is None else _numbers(maps)
    if map_times is None and map_block is not None:
        raise ValueError("--map-block is for --maps")
    check_choice("--map-expert", map_expert, ("sol", "lune"))
    if map_times is not None and map_expert not in _TEACHERS[teachers]:
        raise ValueError(f"--maps of {map_expert} need it among the teachers, which are {teachers}")
    from ..data.scenes import DemoScenes
    from ..data.sources import open_source

    images = DemoScenes(count) if source is None else open_source(source)
    computer = _device(device)
    from moe_sampler.tinyflux.features.cache_build import build_cache

    wanted = None if map_times is None else (map_expert, map_block, map_times)
    teaching, student, default = _models(experts, teachers, convention, encoders, computer, wanted)
    height, width = default if size is None else _size(size)
    settings: dict[str, Any] = {} if times is None else {"t_buckets": times}
    first = int(os.environ.get("RANK", "0")) == 0
    with _bar(shown=first) as progress:
        manifest = build_cache(
            folder,
            images,
            student,
            teaching,
            height=height,
            width=width,
            seed=seed,
            dtype=dtype,
            shard_size=shard_size,
            micro_batch=micro_batch,
            progress=progress,
            **settings,
        )
    if first:
        typer.echo(f"{folder}: {manifest.length} samples in {len(manifest.shards)} shards")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f'"{text}" is not a list of numbers like 0.1,0.5,0.9') from None


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f'"{text}" is not a size like 512 or 512x768 (height x width)')
    return int(parts[0]), int(parts[-1])


def _device(name: str | None) -> Any:
    import torch
    from accelerate import PartialState

    if name is not None:
        return check_device(name)
    return PartialState().device if torch.cuda.is_available() else torch.device("cpu")


def _models(
    experts: Path | None,
    teachers: str,
    convention: str,
    options: EncoderOptions,
    device: Any,
    maps: tuple[str, str | None, list[float]] | None = None,
) -> tuple[Teachers | None, StudentEncoders, tuple[int, int]]:
    """(What teaches, what encodes for the student, the experts' image size)."""
    import torch

    quiet()
    from moe_sampler.tinyflux.features.block_maps import BlockMaps
    from moe_sampler.tinyflux.features.cache_build import Teachers
    from moe_sampler.tinyflux.features.encoders import StudentEncoders, TextEncoder, find_t5

    from .. import HybridPipeline
    from ..demo import experts_path

    if experts is not None and not experts.is_dir():
        raise ValueError(f"{experts} is not a folder")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipe = HybridPipeline.from_pretrained(experts or experts_path(), dtype=dtype).to(device)
    side = pipe.unet_sol.config.sample_size * pipe.vae_scale_factor
    names = _TEACHERS[teachers]
    kept: dict[str, Any] = {"convention": convention}
    if maps is not None:
        kept |= {"maps": BlockMaps.from_pipeline(pipe, *maps[:2]), "map_times": maps[2]}
    teaching = Teachers.from_pipeline(pipe, names, **kept) if names else None
    encoders, vae, clip, t5 = options.encoders, options.vae, options.clip, options.t5
    if encoders is None and vae is None and clip is None and t5 is None:
        text = TextEncoder(pipe.text_encoder, pipe.tokenizer)
        return teaching, StudentEncoders(pipe.vae, text), (side, side)
    base = str(experts or experts_path()) if encoders is None else encoders
    if t5 is None and encoders is not None:
        t5 = find_t5(encoders)
    length: dict[str, Any] = {} if options.t5_length is None else {"t5_length": options.t5_length}
    loaded = StudentEncoders.load(vae or base, clip or base, t5, device=device, **length)
    return teaching, loaded, (side, side)


@app.command()
def check(folder: Folder) -> None:
    """Read all of a cache, compare its checksums, and say what it holds."""
    with one_line_errors():
        from moe_sampler.tinyflux.features.cache_read import FeatureCache

        opened = FeatureCache(folder)
        typer.echo(f"{folder}: {len(opened)} samples in {len(opened.manifest.shards)} shards, all whole")
        for name, (dtype, *shape) in opened.shapes.items():
            typer.echo(f"  {name:21} {dtype:9} {' × '.join(map(str, shape)) or '1'}")
        if opened.manifest.t_buckets:
            times = ", ".join(f"{t:g}" for t in opened.manifest.t_buckets)
            typer.echo(f"  features at t = {times} ({opened.manifest.settings['convention']})")
        if opened.maps_made is not None:
            at = ", ".join(f"{t:g}" for t in opened.maps_made["t"])
            typer.echo(f"  maps of {opened.maps_made['expert']}'s {opened.maps_made['block']} at t = {at}")


@app.command()
def export(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")] = Path("."),
    name: Annotated[str | None, typer.Option(help="The set's name. Default: the cache folder's.")] = None,
) -> None:
    """Write upstream TinyFlux's files: encodings.pt, lune.pt, sol.pt and meta.pt.

    `moe-sampler tinyflux export runs/cache -o upstream/`
    """
    with one_line_errors():
        from moe_sampler.tinyflux.features.cache_read import FeatureCache
        from moe_sampler.tinyflux.features.exchange import export_upstream

        opened = FeatureCache(folder)
        for path in export_upstream(opened, output, name=name):
            typer.echo(str(path))
        for expert, there in (("lune", opened.has_lune), ("sol", opened.has_sol)):
            if not there:
                typer.echo(
                    f"{expert}.pt is left out: the cache has no features of {expert.title()}'s", err=True
                )


@app.command("import")
def import_(
    folder: Folder,
    source: Annotated[Path, typer.Argument(help="Folder with upstream's encodings.pt and the others.")],
    convention: Annotated[
        str,
        typer.Option(help=f"How the features were extracted. {conventions_help()}."),
    ] = CONVENTIONS[1],
    shard_size: Annotated[int, typer.Option(help="Samples a file.")] = 256,
) -> None:
    """Make a cache of upstream TinyFlux's files.

    `moe-sampler tinyflux import runs/cache upstream/`
    """
    with one_line_errors():
        from moe_sampler.tinyflux.features.exchange import import_upstream

        made = import_upstream(
            source, folder, convention=cast("Convention", convention), shard_size=shard_size
        )
        typer.echo(f"{folder}: {made.length} samples in {len(made.shards)} shards")


@app.command()
def show(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")] = Path("maps.png"),
    samples: Annotated[
        str | None, typer.Option(help="Which, as 0,5,7. Default: six, spread over the cache.")
    ] = None,
) -> None:
    """Draw Sol's maps over the images at every bucket.

    `moe-sampler tinyflux show runs/cache -o maps.png`
    """
    with one_line_errors():
        from PIL import Image

        from ..viewing.images import check_writable, save_png

        check_writable(output)
        from moe_sampler.tinyflux.features.cache_read import FeatureCache
        from moe_sampler.tinyflux.features.maps_sheet import maps_sheet

        opened = FeatureCache(folder, verify=False)
        rows = min(6, len(opened))
        chosen = [i * len(opened) // rows for i in range(rows)]
        if samples is not None:
            chosen = [int(number) for number in _numbers(samples)]
        # A palette makes the file half as large.
        save_png(maps_sheet(opened, chosen).quantize(256, kmeans=4, dither=Image.Dither.NONE), output)
        typer.echo(str(output))


if __name__ == "__main__":
    app()
