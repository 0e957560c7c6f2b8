"""`moe-sampler tinyflux ...`. Heavy imports wait until a command needs them, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ..pipelines.choices import CONVENTIONS, conventions_help
from .commands import one_line_errors
from .loras import Lora
from .machine import quiet
from .student_cache import cache, numbers
from .student_sample import sample
from .student_train import train

if TYPE_CHECKING:
    from moe_sampler.tinyflux.features.extraction import Convention

__all__ = ["app"]

app = typer.Typer(rich_markup_mode="markdown")
app.command("train")(train)
app.command()(sample)
app.command()(cache)

Folder = Annotated[Path, typer.Argument(help="Folder of the cache.")]


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


@app.command("export-model")
def export_model(
    student: Annotated[str, typer.Argument(help="As of `sample`.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    ema: Annotated[
        bool, typer.Option("--ema/--no-ema", help="The averaged weights of a trainer's checkpoint.")
    ] = False,
) -> None:
    """Write a student as upstream TinyFlux's load_model reads it: model.safetensors and config.json.

    `moe-sampler tinyflux export-model runs/student -o upstream-student/`
    """
    with one_line_errors():
        from moe_sampler.tinyflux.model.export import export_student
        from moe_sampler.tinyflux.model.tinyflux import TinyFlux

        for note in export_student(TinyFlux.from_pretrained(student, ema=ema), output):
            typer.echo(f"note: {note}", err=True)
        typer.echo(str(output))


@app.command("import")
def import_(
    folder: Folder,
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder with upstream's encodings.pt and the others, or with state.json and shards; or the "
            ".parquet files of rows that `ExtractFeatures` made on a cluster."
        ),
    ],
    convention: Annotated[
        str | None,
        typer.Option(
            help=f"How upstream's features were extracted. {conventions_help()}. Default: {CONVENTIONS[1]}.",
            show_default=False,
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Samples a file.")] = 256,
) -> None:
    """Make a cache of upstream TinyFlux's files, or of rows that a Ray cluster made.

    `moe-sampler tinyflux import runs/cache upstream/`
    """
    with one_line_errors():
        from moe_sampler.tinyflux.features.import_rows import import_rows, parquet_files

        if parquet_files(source):
            if convention is not None:
                raise ValueError(
                    "--convention is for upstream's files: rows say themselves how they were made"
                )
            made = import_rows(source, folder, shard_size=shard_size)
        else:
            from moe_sampler.tinyflux.features.exchange import import_upstream

            chosen = cast("Convention", convention or CONVENTIONS[1])
            made = import_upstream(source, folder, convention=chosen, shard_size=shard_size)
        typer.echo(f"{folder}: {made.length} samples in {len(made.shards)} shards")


@app.command()
def merge(
    student: Annotated[str, typer.Argument(help="Folder, hub id, .safetensors or .pt file of a TinyFlux.")],
    loras: Annotated[list[str], typer.Argument(help="LoRAs of it, PATH or PATH@SCALE.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the student, new.")],
) -> None:
    """Add LoRAs to a student's weights.

    `moe-sampler tinyflux merge runs/student runs/style@0.8 -o merged`
    """
    with one_line_errors():
        from moe_sampler.tinyflux.model.lora import merge_lora, read_lora
        from moe_sampler.tinyflux.model.tinyflux import TinyFlux

        if output.exists():
            raise ValueError(f"{output} exists already: give a new folder")
        quiet()
        model = TinyFlux.from_pretrained(student)
        chosen = [Lora.read(text, "student") for text in loras]
        adapters = [read_lora(each.path, model) for each in chosen]
        for each, layers in zip(chosen, adapters, strict=True):
            merge_lora(model, layers, each.scale)
        model.save_pretrained(output)
        typer.echo(str(output))


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
            chosen = [int(number) for number in numbers(samples)]
        # A palette makes the file half as large.
        save_png(maps_sheet(opened, chosen).quantize(256, kmeans=4, dither=Image.Dither.NONE), output)
        typer.echo(str(output))


if __name__ == "__main__":
    app()
