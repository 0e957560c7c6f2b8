"""What happens on the page: settings move, a picture is wanted, stopped, looked at again."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..cli.demo_limits import size_note, word_note
from ..cli.like import check_types
from ..data.digests import content
from ..viewing.images import zoom, zoom_factor
from ..viewing.parameters import parameters_text
from ..viewing.plan_figure import draw_plan
from ..viewing.sheets import contact_sheet
from .again import command_line, python_code
from .form import Wrong
from .gallery import Gallery
from .look import plan_words, progress
from .page import Page, another_seed
from .painting import Painter, Picture, Preview, Said
from .shelf import Shelf
from .telling import Stop

if TYPE_CHECKING:
    from ..sampling.plan import SamplingPlan

__all__ = ["Acts"]

Shown = dict[Any, Any]


class Acts:
    """The page's reactions, each a function of what its components hold to what they hold then.

    Args:
        page: the components.
        painter: makes pictures.
        gallery: keeps them.
    """

    def __init__(self, page: Page, painter: Painter, gallery: Gallery) -> None:
        self.page, self.painter, self.gallery = page, painter, gallery
        self._cast = painter.cast
        self._running: dict[str, Stop] = {}
        self._shelf = Shelf()

    def values(self, given: tuple[Any, ...]) -> dict[str, Any]:
        """The fields by their names; a text that was never touched comes as None."""
        first = self._cast.form.first
        named = zip(self.page.fields, given, strict=True)
        return {name: "" if value is None and first[name] == "" else value for name, value in named}

    def draw(self, *given: Any) -> Shown:
        """The plan of what is set by now."""
        try:
            settings, plan = self._cast.settings(self.values(given), prompted=False)
        except Wrong as wrong:
            return self._said(wrong)
        blocks = self.page.blocks
        return {
            blocks["plan"]: self._shelf.put(draw_plan(plan)),
            blocks["plan_words"]: plan_words(plan),
            **self._said(),
            **self._noted(settings),
        }

    def groups(self, maker: str) -> list[Any]:
        """Which blocks of fields count for who paints."""
        shown = self._cast.form.shown(maker)
        return [gr.update(visible=bool(shown & {*names})) for _, names in self.page.groups]

    def picture(self, request: gr.Request, visitor: str, *given: Any) -> Iterator[Shown]:
        """Paint, step by step."""
        yield from self._run(visitor, self.values(given), request, self.painter.picture)

    def compare(self, request: gr.Request, visitor: str, *given: Any) -> Iterator[Shown]:
        """Each alone, naive, and together."""
        values = self.values(given) | {"maker": self._cast.form.makers[0]}
        yield from self._run(
            visitor, values, request, lambda settings, _, stop: self.painter.comparison(settings, stop)
        )

    def _run(self, visitor: str, values: dict[str, Any], request: gr.Request, run: Any) -> Iterator[Shown]:
        blocks, stop = self.page.blocks, Stop()
        session = str(request.session_hash)
        self._running[session] = stop
        try:
            settings, plan = self._cast.settings(values)
            if "image" in settings:
                uploaded = Path(settings["image"])
                digest = settings["image_sha256"] = content(uploaded)
                settings["image"] = str(self.gallery.keep_start(visitor, uploaded, digest))
            yield self._said() | self._noted(settings) | {blocks["status"]: progress(plan, 0, "Beginning")}
            last: Picture | None = None
            for found in run(settings, plan, stop):
                if isinstance(found, Said):
                    yield {blocks["status"]: progress(plan, 0, found.text)}
                elif isinstance(found, Preview):
                    yield self._previewed(found)
                else:
                    last = found
                    yield {blocks["picture"]: self._shelf.put(found.image)}
            if last is not None and last.settings is not None and not stop.is_set():
                yield self._kept(visitor, last, plan)
        except Wrong as wrong:
            yield self._said(wrong) | {
                blocks["status"]: _status("Nothing was made: see what is said beside a field.")
            }
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            yield {blocks["status"]: _status(f"It failed: {error}", "wrong")}
        finally:
            stop.set()
            if self._running.get(session) is stop:
                del self._running[session]

    def stop(self, request: gr.Request) -> Shown:
        """End this visitor's run at its next step."""
        text = "Stopped. What is shown is what the experts believed by then; it isn't kept."
        said = _status(text if self._end_run(request) else "Stopped: nothing is being made.")
        return {self.page.blocks["status"]: said, self.page.blocks["said"]: said}

    def left(self, request: gr.Request) -> None:
        """The page was closed or loaded anew: nobody waits for its run."""
        self._end_run(request)

    def _end_run(self, request: gr.Request) -> bool:
        """Whether there was one."""
        running = self._running.get(str(request.session_hash))
        if running is not None:
            running.set()
        return running is not None

    def _previewed(self, found: Preview) -> Shown:
        who, how = found.label.split("\n")
        _, name = who.split(". ")
        factor = zoom_factor(found.image.size)
        text = f"Step {found.step + 1} of {len(found.plan)}, {name} <span class='faint'>· {how}</span>"
        blocks = self.page.blocks
        return {
            blocks["picture"]: self._shelf.put(zoom(found.image, factor), "webp"),
            blocks["status"]: progress(found.plan, found.step + 1, text),
        }

    def _kept(self, visitor: str, made: Picture, plan: SamplingPlan) -> Shown:
        assert made.settings is not None
        width, height = (side // made.settings["zoom"] for side in made.image.size)
        parameters = parameters_text(made.settings, plan, (width, height))
        path = self.gallery.keep(visitor, made.image, made.settings, parameters)
        blocks = self.page.blocks
        found = self._looked_at(visitor, path, made.settings)
        if made.seen:
            seen = [*made.seen, Preview(made.image, len(plan) - 1, plan)]
            sheet = contact_sheet([each.image for each in seen], [each.label for each in seen], 6)
            found[blocks["sheet"]] = self._shelf.put(sheet)
        if "prompts" not in made.settings:
            found[blocks["status"]] = progress(plan, len(plan), _caption(made.settings))
        return found | self._gallery(visitor)

    def _looked_at(self, visitor: str, path: Path, settings: Mapping[str, Any]) -> Shown:
        """A kept picture, and how it is made again."""
        blocks, cast = self.page.blocks, self._cast
        given = {key: value for key, value in vars(cast.encoders).items() if value is not None}
        guided = bool(settings.get("sol_weight") or settings.get("lune_weight"))
        encoders = cast.student_encoders(guided) if "student" in settings else {}
        return {
            blocks["picture"]: str(path),
            blocks["status"]: _status(_caption(settings)),
            blocks["command"]: command_line(settings, cast.where, given),
            blocks["python"]: python_code(settings, cast.model, cast.where, encoders),
            blocks["shown"]: path.name,
        }

    def _gallery(self, visitor: str) -> Shown:
        found = []
        for path in self.gallery.pictures(visitor):
            try:
                found.append((str(path), _caption(self.gallery.settings(visitor, path))))
            except ValueError:  # damaged from outside: not ours any more
                continue
        return {
            self.page.blocks["kept"]: gr.update(visible=bool(found)),
            self.page.blocks["gallery"]: gr.update(value=found, selected_index=None),
            self.page.blocks["paths"]: [Path(path).name for path, _ in found],
        }

    def look(self, visitor: str, names: list[str], event: gr.SelectData) -> Shown:
        """A picture of the gallery, with the settings it was made with."""
        return self._opened(visitor, names[event.index])

    def _opened(self, visitor: str, name: str) -> Shown:
        path = self.gallery.folder / visitor / name
        settings = self.gallery.settings(visitor, path)
        check_types(settings, path)
        values = self._cast.form.values(settings)
        if values["image"] and not Path(values["image"]).exists():
            values["image"] = None
        fields = {component: values[name] for name, component in self.page.fields.items()}
        return fields | self._looked_at(visitor, path, settings) | {self.page.blocks["sheet"]: None}

    def remove(self, visitor: str, shown: str) -> Shown:
        """The picture that is shown, out of the gallery."""
        if not shown:
            return {self.page.blocks["status"]: _status("No picture of the gallery is shown.")}
        self.gallery.remove(visitor, self.gallery.folder / visitor / shown)
        blocks = self.page.blocks
        bare = {blocks[name]: None for name in ("picture", "sheet", "command", "python")}
        return bare | {blocks["shown"]: "", blocks["status"]: _status("Removed.")} | self._gallery(visitor)

    def begin(self, told: Any) -> Shown:
        """The page as the visitor left it: the gallery, and the newest picture with its settings."""
        visitor = self.gallery.visitor(told)
        found = {self.page.blocks["visitor"]: visitor} | self._gallery(visitor)
        names = found[self.page.blocks["paths"]]
        return found | (self._opened(visitor, names[0]) if names else {})

    def dice(self) -> int:
        return another_seed()

    def _said(self, wrong: Wrong | None = None) -> Shown:
        """What is wrong beside its field, and nothing beside the others."""
        found = {component: gr.update(value="", visible=False) for component in self.page.wrong.values()}
        if wrong is not None:
            place = self.page.wrong.get(wrong.field, self.page.wrong[""])
            text = f'<p role="alert">{html.escape(str(wrong))}</p>'
            found[place] = gr.update(value=text, visible=True)
        return found

    def _noted(self, settings: Mapping[str, Any]) -> Shown:
        """Words that the demo was never told, and a size that it wasn't shown, below their fields."""
        if not self._cast.model.is_demo:
            return {}
        found = {
            "prompt": word_note([settings["prompt"]]),
            "negative": word_note([settings.get("negative_prompt", "")]),
            "width": size_note([settings]),
        }
        return {
            self.page.wrong[field]: gr.update(value=f'<p class="note">{_sentence(note)}</p>', visible=True)
            for field, note in found.items()
            if note is not None
        }


def _sentence(note: str) -> str:
    return html.escape(note[0].upper() + note[1:])


def _status(text: str, kind: str = "") -> str:
    return f'<div class="status {kind}" role="status">{html.escape(text)}</div>'


def _caption(settings: Mapping[str, Any]) -> str:
    prompts, seeds = settings.get("prompts"), settings.get("seeds")
    if prompts:
        return f"{prompts[0]} · compared, seed {seeds[0] if seeds else 0}"
    return f"{settings['prompt']} · seed {settings['seed']}"
