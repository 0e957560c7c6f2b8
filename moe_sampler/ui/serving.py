"""The page as a server: built, wired, and started without a look at the network."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

from .gallery import Gallery, default_folder
from .painting import Painter
from .planning import Cast

__all__ = ["build", "serve"]

_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
_WAITING = 64
"""Visitors in the queue."""


def _gradio() -> Any:
    os.environ.update(_QUIET)
    try:
        import gradio
    except ImportError:
        raise ValueError("the page needs Gradio: pip install 'moe-sampler[ui]'") from None
    return gradio


def build(cast: Cast | None = None, gallery: Path | None = None) -> Any:
    """The page, a `gradio.Blocks` with its queue, to be launched or mounted by other means than `serve`.

    Args:
        cast: who paints; the demo experts by default.
        gallery: the folder for pictures, which `launch` must be allowed to read (`allowed_paths`); in the
            user's cache by default.

    Raises:
        ValueError: no Gradio, or a model that isn't there.
    """
    gr = _gradio()
    return _built(gr, Painter(Cast() if cast is None else cast), gallery or default_folder())


def _built(gr: Any, painter: Painter, gallery: Path) -> Any:
    from .acting import Acts
    from .page import lay_out

    with gr.Blocks(title="moe-sampler", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        page = lay_out(painter.cast)
        page.blocks |= {
            "visitor": gr.BrowserState("", storage_key="moe-sampler", secret="moe-sampler"),
            "paths": gr.State([]),
            "shown": gr.State(""),
            "said": gr.State(""),
        }
        _wire(gr, blocks, page, Acts(page, painter, Gallery(gallery)))
    return blocks.queue(max_size=_WAITING)


def _wire(gr: Any, blocks: Any, page: Any, acts: Any) -> None:
    fields, own = list(page.fields.values()), page.blocks
    drawn = [own["plan"], own["plan_words"], *page.wrong.values()]
    everything = [*fields, *own.values(), *page.wrong.values()]
    everything = [each for each in everything if not isinstance(each, gr.Button)]
    silent = {"queue": False, "show_progress": "hidden"}

    moving = [
        each.change for name, each in page.fields.items() if name not in ("prompt", "negative", "speed")
    ]
    gr.on(moving, acts.draw, fields, drawn, trigger_mode="always_last", **silent)
    groups = [group for group, _ in page.groups]
    page.fields["maker"].change(acts.groups, page.fields["maker"], groups, **silent)
    own["dice"].click(acts.dice, None, page.fields["seed"], **silent)

    # One run at a time on the models; the others wait in the queue, which tells them their place.
    turn = {"concurrency_limit": 1, "concurrency_id": "models", "show_progress_on": own["status"]}
    asked = [own["visitor"], *fields]
    making = [
        gr.on([own["generate"].click, page.fields["prompt"].submit], acts.picture, asked, everything, **turn)
    ]
    if "compare" in own:
        making.append(own["compare"].click(acts.compare, asked, everything, **turn))
    # Said again once the run's own words have ended, of which one may come late.
    stopping = own["cancel"].click(acts.stop, None, [own["status"], own["said"]], cancels=making, **silent)
    stopping.then(lambda said: said, own["said"], own["status"], **silent)

    own["gallery"].select(acts.look, [own["visitor"], own["paths"]], everything, **silent)
    own["remove"].click(acts.remove, [own["visitor"], own["shown"]], everything, **silent)
    blocks.load(acts.begin, own["visitor"], everything, **silent).then(acts.draw, fields, drawn, **silent)
    blocks.unload(acts.left)


def serve(
    cast: Cast | None = None,
    *,
    host: str | None = None,
    port: int | None = None,
    gallery: Path | None = None,
    inbrowser: bool = False,
    wait: bool = True,
) -> str:
    """Start the page; returns its address once it ends, or with `wait=False` at once.

    Args:
        cast, gallery: as `build` takes them.
        host: 127.0.0.1 unless the environment variable GRADIO_SERVER_NAME says otherwise, as a Hugging Face
            Space's does.
        port: by default the first free one from 7860 on.
        inbrowser: open it in a browser here.
        wait: until Ctrl-C.

    Raises:
        ValueError: as of `build`.
        OSError: the port is taken.
    """
    from .look import CSS, HEAD, theme

    gr, kept = _gradio(), gallery or default_folder()
    painter = Painter(Cast() if cast is None else cast)
    blocks = _built(gr, painter, kept)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        inbrowser=inbrowser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=True,
        allowed_paths=[str(kept)],
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        theme=theme(),
        css=CSS,
        head=HEAD,
    )
    painter.warm()
    if wait:
        print(f"moe-sampler's page is at {address} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            threading.Event().wait()
        blocks.close(verbose=False)
    return address
