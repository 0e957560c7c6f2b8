"""`moe-sampler generate --prompts FILE`: a picture for every row, by any number of processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._numbers import whole
from ..pipelines.choices import PICTURE_FORMATS, check_choice
from .clusters import check_cluster
from .options import OutputOptions, option

if TYPE_CHECKING:
    from ..rows.batches import Picture, Unit
    from ..rows.processes import Processes
    from ..rows.work import Done, Output, Worker
    from .asked import Asked

__all__ = ["RowOptions", "generate_rows"]

ROWS = "Many prompts"
_BATCH = 4
_SHOWN = 20
"""Bad rows that are said one by one; the file has them all."""


@dataclass(frozen=True)
class RowOptions:
    """A file of prompts, a picture each."""

    prompts_file: Annotated[
        Path | None,
        option(
            "A picture for every row of a .txt, .jsonl, .csv or .parquet file; other columns are options of "
            "that row.",
            ROWS,
            "--prompts",
            metavar="FILE",
        ),
    ] = None
    output_dir: Annotated[
        Path | None,
        option(
            "With --prompts: folder of the pictures and their metadata.jsonl. Called again, what is finished "
            "is skipped.",
            ROWS,
            metavar="FOLDER",
        ),
    ] = None
    prompt_column: Annotated[
        str | None, option("Column of the prompts. Default: prompt, text or caption.", ROWS, metavar="NAME")
    ] = None
    keep_columns: Annotated[
        list[str] | None,
        option("A column that is passed on to metadata.jsonl.", ROWS, "--keep-column", metavar="NAME"),
    ] = None
    image_format: Annotated[
        str | None, option("Of the pictures. Default: png.", ROWS, metavar="|".join(PICTURE_FORMATS))
    ] = None
    shard_size: Annotated[
        int | None,
        option("Write WebDataset's tars of so many rows, not files.", ROWS, metavar="ROWS"),
    ] = None

    ray: Annotated[
        str | None,
        option(
            "Share the rows out over a Ray cluster: its address, auto for the one this machine is in, or "
            "local.",
            ROWS,
            metavar="ADDRESS",
        ),
    ] = None
    ray_workers: Annotated[
        int | None, option("Of --ray, at most. Default: one a GPU, or a CPU.", ROWS, metavar="N")
    ] = None

    def check(self, prompts: Sequence[str] | None, out: OutputOptions) -> None:
        """Raise ValueError for options that don't go together."""
        fields = dataclasses.fields(self)[1:]
        given = [f"--{f.name.replace('_', '-')}" for f in fields if getattr(self, f.name) is not None]
        given = [flag.replace("columns", "column") for flag in given]
        if self.prompts_file is None:
            if given:
                raise ValueError(f"{' and '.join(given)}: for --prompts FILE")
            return
        if prompts:
            raise ValueError("give prompts or --prompts FILE, not both")
        if self.output_dir is None:
            raise ValueError("--prompts needs a folder for the pictures: give --output-dir")
        if out.output != OutputOptions.output:
            raise ValueError("--output is one image's name: --prompts takes --output-dir")
        if out.trace or out.animate:
            raise ValueError("--trace and --animate are of single images, not for --prompts")
        check_choice("image format", self.image_format or PICTURE_FORMATS[0], PICTURE_FORMATS)
        if self.shard_size is not None:
            whole("--shard-size", self.shard_size, 10**9)
        check_cluster(self.ray, self.ray_workers)


def generate_rows(
    asked: Asked,
    settings: Mapping[str, Any],
    options: RowOptions,
    out: OutputOptions,
    image: Path | None,
    batch_size: int | None,
) -> None:
    """Make what the file asks for and isn't there yet.

    Args:
        asked, settings: what the options ask for, of a row that says nothing.
        options, out: the others.
        image: that rows start from.
        batch_size: pictures sampled at once.

    Raises:
        ValueError: wrong options or columns, before any work.
        typer.Exit: with 1, if a row failed.
    """
    from ..rows.batches import QUEUE, units_of
    from ..rows.processes import Processes
    from ..rows.work import missing, open_output

    assert options.output_dir is not None
    pictures, problems = _read(asked, settings, options, out, image)
    batch_size = batch_size or _BATCH
    together = QUEUE if asked.computer.offload == "expert" else 1
    units = units_of(pictures, batch_size, together, options.shard_size)
    output = open_output(options.output_dir, pictures, options.shard_size)
    processes = Processes()
    if options.ray is not None:
        if processes.count > 1:
            raise ValueError("--ray shares the rows out itself: leave out accelerate launch")
        from ..ray.cluster import connect

        connect(options.ray)
    with ExitStack() as held:
        todo: Any = None
        if processes.is_first:
            try:
                _begin(output, held)
                todo = [number for number, unit in enumerate(units) if not output.is_done(unit)]
            except (ValueError, OSError) as error:
                todo = error
        todo = processes.shared(todo)
        report = _Report(output, problems, len(pictures), processes.is_first, out.quiet)
        with report.written():
            mine = [units[number] for number in todo[processes.index :: processes.count]]
            total, done = missing(mine, output), 0
            if mine and processes.is_first and not out.quiet:
                _warn(asked, pictures)
            if mine:
                with _progress(processes, out.quiet) as progress:
                    progress(0, total)
                    for count, failures in _done(asked, mine, output, batch_size, options, processes):
                        done += count
                        report.failures += failures
                        progress(done, total)
            report.failures = processes.gathered(report.failures)  # everyone has done its share
            if processes.is_first:
                output.tidy()
        report.say(sum(processes.gathered([total])))
    if problems or report.failures:
        raise typer.Exit(1)


def _read(
    asked: Asked,
    settings: Mapping[str, Any],
    options: RowOptions,
    out: OutputOptions,
    image: Path | None,
) -> tuple[list[Picture], list[dict[str, Any]]]:
    """(What the rows ask for, what is wrong with the others)."""
    from ..rows.files import read_rows
    from ..rows.work import failure
    from .prompt_rows import RowReader

    assert options.prompts_file is not None
    rows, columns = read_rows(options.prompts_file)
    reader = RowReader(
        asked,
        {"seed": asked.previous.get("seed", 0) if out.seed is None else out.seed, **settings}
        | ({"zoom": out.zoom or asked.previous.get("zoom", 1)}),
        image=image,
        images=out.images,
        columns=columns,
        prompt_column=options.prompt_column,
        keep=options.keep_columns or (),
        folder=options.prompts_file.parent,
        image_format=options.image_format or PICTURE_FORMATS[0],
        dots=options.shard_size is None,
    )
    pictures: list[Picture] = []
    problems: list[dict[str, Any]] = []
    for row in rows:
        try:
            pictures += reader(row)
        except ValueError as error:
            problems.append(failure(row.number, row.place, " ".join(str(error).split())))
    return pictures, problems


def _begin(output: Output, held: ExitStack) -> None:
    from .._files import claim, sole_user
    from ..rows.folder import KIND

    claim(output.folder, KIND)
    held.enter_context(sole_user(output.folder, "written"))
    output.begin()
    output.check()


def _done(
    asked: Asked,
    units: Sequence[Unit],
    output: Output,
    batch_size: int,
    options: RowOptions,
    processes: Processes,
) -> Iterator[Done]:
    """What comes of the units, one after the other here, or on a cluster."""
    from ..rows.work import Worker

    computer = asked.computer
    if computer.device == "cuda" and processes.device is not None:  # one each
        asked = dataclasses.replace(asked, computer=dataclasses.replace(computer, device=processes.device))
    worker = partial(Worker, asked.load, output.folder.resolve(), options.shard_size, batch_size)
    if options.ray is None:
        yield from chain.from_iterable(map(worker(), units))
        return
    from ..ray.cluster import over_workers

    gpus = 1 if computer.device.startswith("cuda") else 0
    make = partial(_at_once, worker)
    yield from over_workers(options.ray, make, units, workers=options.ray_workers, gpus=gpus)


def _at_once(make: Callable[[], Worker]) -> Callable[[Unit], Done]:
    """A worker that says what came of a unit when it is done."""
    from ..rows.work import joined

    worker = make()
    return lambda unit: joined(worker(unit))


def _warn(asked: Asked, pictures: Sequence[Picture]) -> None:
    from .demo_limits import warn_of_limits

    if asked.model.is_demo:
        every = [picture.settings for picture in pictures]
        negatives = [settings.get("negative_prompt") for settings in every]
        warn_of_limits([settings["prompt"] for settings in every], negatives, every)


def _progress(processes: Processes, quiet: bool) -> Any:
    from .progress import progress_bar

    own = f" of process 1 of {processes.count}" if processes.count > 1 else ""
    return progress_bar(f"pictures{own}", shown=processes.is_first and not quiet)


class _Report:
    """What came of it: errors.jsonl, and a few lines, by the first process.

    Args:
        output: where pictures are.
        problems: of rows that ask for nothing that can be.
        wanted: pictures in all.
        first: whether this is the first process.
        quiet: whether only errors are said.
    """

    def __init__(
        self, output: Output, problems: list[dict[str, Any]], wanted: int, first: bool, quiet: bool
    ) -> None:
        self._output, self._problems, self._wanted = output, problems, wanted
        self._first, self._quiet = first, quiet
        self.failures: list[dict[str, Any]] = []
        self._count, self._file = 0, None

    @contextmanager
    def written(self) -> Iterator[None]:
        """However the block ends, what is finished by then is listed."""
        try:
            yield
        finally:
            if self._first:
                from ..rows.folder import write_errors

                self._count = self._output.close()
                self._file = write_errors(self._output.folder, self._errors)

    @property
    def _errors(self) -> list[dict[str, Any]]:
        return sorted([*self._problems, *self.failures], key=lambda error: error["row"])

    def say(self, tried: int) -> None:
        """tried: pictures that weren't there before."""
        if not self._first:
            return
        for error in self._errors[:_SHOWN]:
            typer.secho(f"row {error['row']} ({error['place']}): {error['error']}", fg="red", err=True)
        folder, failed = self._output.folder, {error["row"] for error in self._errors}
        if failed:
            rows = "1 row" if len(failed) == 1 else f"{len(failed)} rows"
            typer.echo(f"{rows} failed: {self._file}", err=True)
        if not self._quiet:
            before = self._wanted - tried
            there = f", {before} of them were there" if before else ""
            typer.echo(f"{folder}: {self._count} pictures{there}")
