"""`moe-sampler ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .commands import takes
from .options import STUDENT, EncoderOptions, PipelineOptions

__all__ = ["ui"]


@takes(where=PipelineOptions, of=EncoderOptions)
def ui(
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen at; 0.0.0.0 for other machines. Default: 127.0.0.1.", metavar="ADDRESS"
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Default: the first free one from 7860 on.", metavar="N")
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(help="Folder for the pictures. Default: in the user's cache folder.", metavar="FOLDER"),
    ] = None,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    student: Annotated[
        str | None,
        typer.Option(
            help="A TinyFlux that may paint, too: a folder, hub id, .safetensors or .pt file, or demo, the "
            "small one in the package.",
            metavar="SOURCE",
            rich_help_panel=STUDENT,
        ),
    ] = None,
    *,
    where: PipelineOptions,
    of: EncoderOptions,
) -> None:
    """Make images on a page in the browser: the plan is drawn as settings move, and the experts are watched
    while they paint. Needs the extra `ui`: `pip install "moe-sampler[ui]"`.

    `moe-sampler ui --open`

    `moe-sampler ui --preset sd15 --offload expert`
    """
    from ..ui import serve
    from ..ui.planning import Cast

    serve(Cast(where, student, of), host=host, port=port, gallery=gallery, inbrowser=browser)
