"""Side by side from the same noise: each expert alone, a naive handoff and the hybrid; or ways to step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .._numbers import whole
from ..sampling.experts import Expert
from ..sampling.naive import check_comparable, naive_plan
from ..sampling.plan import SamplingPlan
from ..viewing.sheets import FAINT, INK, Sheet, fitted, scalable_font
from .finished import as_finished
from .prompts import Negative
from .solver_columns import Stepping, plan_of_calls

__all__ = ["Comparison", "compare"]

_EXPERT_SETTINGS = (
    *("shift", "solver", "levels", "eta"),
    *("guidance_scale", "guidance_rescale", "guidance_window", "guider"),
)


@dataclass(frozen=True)
class Comparison:
    """Images by method, in rows.

    Args:
        titles, notes: of each column.
        images: by column, then by row; None for one that isn't made yet.
        rows: what was asked for in each row.
        plans: what each column ran.
    """

    titles: tuple[str, ...]
    notes: tuple[str, ...]
    images: tuple[tuple[Image.Image | None, ...], ...]
    rows: tuple[str, ...]
    plans: tuple[SamplingPlan, ...]

    def sheet(self, tile: int = 256) -> Image.Image:
        """All images in one: what each column is at the top, and what was asked for above each row. Places of
        images that aren't made yet stay empty.

        Args:
            tile: width of each image in the sheet, in pixels.
        """
        large, small = (scalable_font(max(13, round(tile / part))) for part in (14, 20))
        gap, line, below_title = max(8, tile // 28), round(small.size * 1.35), round(large.size * 1.4)
        made = next((image for images in self.images for image in images if image is not None), None)
        height = tile if made is None else round(tile * made.height / made.width)
        lines = max(note.count("\n") + 1 for note in self.notes)
        sheet = Sheet(
            len(self.titles),
            len(self.rows),
            (tile, height),
            gap=gap,
            margins=(gap, gap + below_title + lines * line + gap, gap, gap),
            above=line + gap // 2,
        )
        for column, (title, note) in enumerate(zip(self.titles, self.notes, strict=True)):
            x, _ = sheet.corner(column, 0)
            sheet.draw.text((x, gap), fitted(title, large, tile), fill=INK, font=large)
            for number, text in enumerate(note.split("\n")):
                y = gap + below_title + number * line
                sheet.draw.text((x, y), fitted(text, small, tile), fill=FAINT, font=small)
        for row, text in enumerate(self.rows):
            x, y = sheet.corner(0, row)
            text = fitted(text, small, sheet.image.width - 2 * gap)
            sheet.draw.text((x, y - gap // 2 - line), text, fill=INK, font=small)
            for column, images in enumerate(self.images):
                image = images[row]
                if image is not None:
                    sheet.paste(image, column, row)
        return sheet.image


def compare(
    pipe: Any,
    prompt: str | Sequence[str],
    seed: int | Sequence[int] = 0,
    num_inference_steps: int | None = None,
    handoff: float | None = None,
    *,
    solvers: Sequence[str] | None = None,
    negative_prompt: Negative | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    on_batch_end: Callable[[Comparison], None] | None = None,
    **settings: Any,
) -> Comparison:
    """The first expert alone, the second alone, both with a naive handoff and both with the right one; or, of
    several `solvers`, the hybrid with each of them.

    All columns start from the same noise and take the same number of steps, or, of solvers, at most so many
    model calls (a guided one counts once).

    Args:
        pipe: a `HybridPipeline`; without `solvers`, of a DDPM expert and a flow expert, as Sol and Lune.
        prompt, seed: every prompt is made with every seed, a row each.
        num_inference_steps, handoff: by default the model's.
        solvers: as `Stepping.read` reads them: "dpmpp_2m", "ddpm+euler", "dpmpp_2m@karras".
        negative_prompt, height, width, batch_size: as the pipeline takes them; a negative prompt is one text
            for all, or a mapping to texts by expert.
        on_batch_end: given what there is whenever a batch of images ends, so that it can be kept.
        settings: `shift`, `solver`, `levels`, `eta`, `guidance_scale`, `guidance_rescale`,
            `guidance_window`, `guider`.

    Raises:
        ValueError: wrong input, before any work.
    """
    unknown = settings.keys() - set(_EXPERT_SETTINGS)
    if unknown:
        raise TypeError(f"compare takes no {', '.join(sorted(unknown))}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    seeds = list(seed) if isinstance(seed, Iterable) else [seed]
    if not prompts or not seeds:
        raise ValueError("give at least one prompt and one seed")
    settings["reuse"] = 1  # whatever the pipeline's speed: what is compared is something else
    if solvers:
        titles, notes, plans = _by_solver(pipe, solvers, num_inference_steps, handoff, settings)
    else:
        titles, notes, plans = _by_method(pipe, num_inference_steps, handoff, settings)
    asked = [(text, each) for text in prompts for each in seeds]
    call: dict[str, Any] = dict(
        prompt=[text for text, _ in asked],
        seed=[each for _, each in asked],
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        batch_size=batch_size,
    )
    made: list[list[Image.Image | None]] = [[None] * len(asked) for _ in plans]
    rows = tuple(f'"{text}", seed {each}' for text, each in asked)

    def so_far() -> Comparison:
        return Comparison(titles, notes, tuple(map(tuple, made)), rows, plans)

    size = batch_size or len(asked)
    for own, column in zip(plans, made, strict=True):

        def take(index: int, image: Image.Image, column: list[Image.Image | None] = column) -> None:
            column[index] = image
            if on_batch_end is not None and ((index + 1) % size == 0 or index + 1 == len(asked)):
                on_batch_end(so_far())

        as_finished(pipe, len(own), take, plan=own, **call)
    return so_far()


_Columns = tuple[tuple[str, ...], tuple[str, ...], tuple[SamplingPlan, ...]]
"""Titles, notes and plans."""


def _by_method(pipe: Any, steps: int | None, handoff: float | None, settings: dict[str, Any]) -> _Columns:
    experts = pipe.experts(**settings)
    check_comparable(experts)
    right = pipe.plan("hybrid", steps, handoff=handoff, experts=experts)
    wrong = naive_plan(experts, right)
    alone = [pipe.plan(e.name, steps, experts=experts) for e in experts]
    titles = (*(f"{e.name.title()} alone" for e in experts), "Naive handoff", "Hybrid")
    return titles, _notes(experts, alone, wrong, right), (*alone, wrong, right)


def _by_solver(
    pipe: Any, solvers: Sequence[str], calls: int | None, handoff: float | None, settings: dict[str, Any]
) -> _Columns:
    beside = [name for name in ("solver", "levels") if settings.get(name) is not None]
    if beside:
        raise ValueError(f"solvers says how every column steps: leave out {' and '.join(beside)}")
    most = whole(
        "the number of model calls", pipe.config["num_inference_steps"] if calls is None else calls, 1000
    )
    plans = []
    for stepping in [Stepping.read(text, pipe.expert_names) for text in solvers]:
        experts = pipe.experts(**{**settings, **stepping.settings})

        def make(steps: int, experts: Sequence[Expert] = experts) -> SamplingPlan:
            return pipe.plan("hybrid", steps, handoff=handoff, experts=experts)

        plans.append(plan_of_calls(make, most))
    notes = [f"{len(each)} model calls\n{'with' if each.needs_noise else 'no'} fresh noise" for each in plans]
    return tuple(solvers), tuple(notes), tuple(plans)


def _notes(
    experts: Sequence[Expert], alone: Sequence[SamplingPlan], wrong: SamplingPlan, right: SamplingPlan
) -> tuple[str, ...]:
    def shares(one: SamplingPlan) -> str:
        counts = [sum(s.calls[0].name == e.name and not s.corrects for s in one.steps) for e in experts]
        return " + ".join(f"{n} {e.name.title()}" for n, e in zip(counts, experts, strict=True) if n)

    noise = next(s.level.noise for s in right.steps if s.calls[0].name == experts[1].name)
    told = next(s.level.noise for s in wrong.steps if s.calls[0].name == experts[1].name)
    texts = [f"{e.prediction.replace('_prediction', '')}-prediction, {e.solver}" for e in experts]
    texts += [f"not converted, s = t / 1000 = {told:.2f}", f"exact, at noise {noise:.2f}"]
    return tuple(
        f"{text}\n{shares(one)} steps" for text, one in zip(texts, (*alone, wrong, right), strict=True)
    )
