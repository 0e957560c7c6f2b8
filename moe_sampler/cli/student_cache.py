"""`moe-sampler tinyflux cache`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..pipelines.choices import CONVENTIONS, DTYPES, any_of, check_choice, conventions_help
from .clusters import check_cluster
from .commands import takes
from .machine import Machine, check_device, quiet
from .models import Model
from .options import MODEL, EncoderOptions, ModelOptions, ReadingOptions, given_flags, option
from .progress import progress_bar

if TYPE_CHECKING:
    from moe_sampler.tinyflux.features.cache_build import Cluster
    from moe_sampler.tinyflux.features.encoders import StudentEncoders
    from moe_sampler.tinyflux.features.teachers import Teachers

    from ..data.samples import Source
    from ..loading.hub import Hub

__all__ = ["cache", "numbers"]

_TEACHERS = {"sol": ("sol",), "lune": ("lune",), "both": ("sol", "lune"), "none": ()}


@dataclass(frozen=True)
class TeacherOptions(ModelOptions):
    """Where the experts are that teach."""

    model: Annotated[
        str | None,
        option(
            "Folder or hub id of the experts (unet_sol/, unet_lune/), or of a Stable Diffusion base for "
            "--sol and --lune. Default: demo, the tiny experts in the package.",
            MODEL,
            "--experts",
            metavar="FOLDER|ID",
        ),
    ] = None


@takes(encoders=EncoderOptions, experts=TeacherOptions, reading=ReadingOptions)
def cache(
    folder: Annotated[Path, typer.Argument(help="Folder of the cache.")],
    source: Annotated[
        Path | None,
        typer.Argument(
            help="Images and captions: a folder (a.png + a.txt, metadata.jsonl or metadata.csv), .tar or "
            ".parquet files, or a data set of the Hugging Face hub, owner/name.",
            show_default=False,
        ),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The demo's scenes, instead of SOURCE.")] = False,
    count: Annotated[
        int | None, typer.Option(help="The first so many images; all by default, and 256 scenes with --demo.")
    ] = None,
    teachers: Annotated[
        str | None, typer.Option(help=f"{any_of(_TEACHERS)}. Default: those that are among the experts.")
    ] = None,
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
    ray: Annotated[
        str | None,
        typer.Option(
            help="Build the shards on a Ray cluster: its address, auto for the one this machine is in, or "
            "local.",
            metavar="ADDRESS",
        ),
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option(help="Of --ray, at most. Default: one a GPU, or a CPU.", metavar="N")
    ] = None,
    *,
    encoders: EncoderOptions,
    experts: TeacherOptions,
    reading: ReadingOptions,
) -> None:
    """Encode images and captions, and extract what the experts teach about them.

    `moe-sampler tinyflux cache runs/cache --demo`

    `moe-sampler tinyflux cache runs/cache pictures/ --preset sd15`

    Stopped, it continues when called again with the same arguments. Several processes:

    `accelerate launch --num_processes 4 -m moe_sampler.cli tinyflux cache runs/cache pictures/`
    """
    if (source is None) != demo:
        raise ValueError("give a SOURCE of images and captions, or --demo")
    if source is None and (given := reading.given()):
        raise ValueError(f"{', '.join(given)}: for a SOURCE, not for --demo")
    check_cluster(ray, ray_workers)
    if ray is not None and "WORLD_SIZE" in os.environ:
        raise ValueError("--ray shares the shards out itself: leave out accelerate launch")
    if teachers is not None:
        check_choice("--teachers", teachers, _TEACHERS)
    check_choice("--convention", convention, CONVENTIONS)
    if teachers == "none" and convention != CONVENTIONS[0]:
        raise ValueError(f"--convention {convention} is of the experts' features: leave out --teachers none")
    check_choice("--dtype", dtype, DTYPES)
    times = None if buckets is None else numbers(buckets)
    map_times = None if maps is None else numbers(maps)
    if map_times is None and map_block is not None:
        raise ValueError("--map-block is for --maps")
    check_choice("--map-expert", map_expert, ("sol", "lune"))
    model, names = _experts(experts, teachers, encoders)
    if map_times is not None and map_expert not in names:
        raise ValueError(
            f"--maps of {map_expert} need it among the teachers, which are {' and '.join(names) or 'none'}"
        )
    opened = partial(_source, source, count, seed, reading.given())
    images, computer = opened(), _device(device)
    from moe_sampler.tinyflux.features.cache_build import build_cache

    wanted = None if map_times is None else (map_expert, map_block, map_times)
    from ..loading.hub import Hub

    hub = Hub(local_files_only=experts.local_files_only)
    loaded = partial(_load, model, names, convention, encoders, computer, wanted, hub)
    teaching, student, default = loaded()
    if size is None and default is None:
        raise ValueError("nothing says how large the images are: give --size")
    height, width = (default, default) if size is None else _size(size)
    settings: dict[str, Any] = {} if times is None else {"t_buckets": times}
    first = int(os.environ.get("RANK", "0")) == 0
    if ray is not None:
        settings["cluster"] = _cluster(ray, ray_workers, computer, opened, loaded)
    with progress_bar("samples", shown=first) as progress:
        manifest = build_cache(
            folder,
            images,
            student,
            teaching,
            height=cast(int, height),
            width=cast(int, width),
            seed=seed,
            dtype=dtype,
            shard_size=shard_size,
            micro_batch=micro_batch,
            progress=progress,
            **settings,
        )
    if first:
        typer.echo(f"{folder}: {manifest.length} samples in {len(manifest.shards)} shards")


def _source(path: Path | None, count: int | None, seed: int, reading: Mapping[str, Any]) -> Source:
    """Images and captions; without a path, the demo's."""
    from ..data.scenes import DemoScenes
    from ..data.sources import open_source

    if path is None:
        return DemoScenes(256 if count is None else count)
    return open_source(path.resolve() if path.exists() else path, count=count, seed=seed, **reading)


def _cluster(
    address: str,
    workers: int | None,
    device: Any,
    opened: Callable[[], Source],
    loaded: Callable[[], tuple[Teachers | None, StudentEncoders, int | None]],
) -> Cluster:
    """The workers of a Ray cluster, each of which loads what this process loads."""
    from moe_sampler.tinyflux.features.cache_build import Cluster

    from ..ray.cluster import over_workers

    gpus = 1 if device.type == "cuda" else 0
    return Cluster(partial(over_workers, address, workers=workers, gpus=gpus), partial(_all, opened, loaded))


def _all(
    opened: Callable[[], Source], loaded: Callable[[], tuple[Teachers | None, StudentEncoders, int | None]]
) -> tuple[Source, StudentEncoders, Teachers | None]:
    teaching, student, _ = loaded()
    return opened(), student, teaching


def numbers(text: str) -> list[float]:
    """Of "0.1,0.5"."""
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


def _experts(
    options: TeacherOptions, teachers: str | None, encoders: EncoderOptions
) -> tuple[Model | None, tuple[str, ...]]:
    """(The experts' model, or None where nothing needs it; who of them teaches), from configs alone."""
    places = ("model", "preset", "sol", "lune", "sd15", "expert_source")
    named = any(getattr(options, place) for place in places)
    own = given_flags(encoders)
    if own and not named:
        if teachers != "none":
            raise ValueError(
                f"{' and '.join(own)} say what the student sees and reads with, not who teaches it: give "
                "--preset sd15, or --experts (demo for the demo's), or --teachers none"
            )
        if encoders.encoders or (encoders.vae and encoders.clip):
            return None, ()
    model = Model.read(options, {})
    found = tuple(name for name in ("sol", "lune") if name in model.training()[0])
    wanted = found if teachers is None else _TEACHERS[teachers]
    if teachers is None and not found:
        raise ValueError("sol and lune teach, and neither is among the experts: give --teachers none")
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"--teachers {teachers}: the experts have no {' and no '.join(missing)}")
    return model, wanted


def _load(
    model: Model | None,
    names: tuple[str, ...],
    convention: str,
    options: EncoderOptions,
    device: Any,
    maps: tuple[str, str | None, list[float]] | None,
    hub: Hub,
) -> tuple[Teachers | None, StudentEncoders, int | None]:
    """(What teaches, what encodes for the student, the images' side)."""
    quiet()
    from moe_sampler.tinyflux.features.block_maps import BlockMaps
    from moe_sampler.tinyflux.features.encoders import StudentEncoders
    from moe_sampler.tinyflux.features.teachers import Teachers, image_side
    from moe_sampler.tinyflux.sampling.fitting import default_side

    if model is None:
        student = StudentEncoders.gather(**vars(options), device=device, hub=hub)
        side = None if options.encoders is None else default_side(options.encoders, hub)
        return None, student, None if side is None else side * student.scale
    dtype = "float16" if device.type == "cuda" else "float32"
    pipe = model.load(Machine(str(device), dtype, "none"))
    kept: dict[str, Any] = {"convention": convention}
    if maps is not None:
        kept |= {"maps": BlockMaps.from_pipeline(pipe, *maps[:2]), "map_times": maps[2]}
    teaching = Teachers.from_pipeline(pipe, names, **kept) if names else None
    student = StudentEncoders.gather(pipe, **vars(options), device=device, hub=hub)
    return teaching, student, image_side(pipe)
