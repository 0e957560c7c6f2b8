"""A drawing of a plan: how the noise goes down step by step, and which expert is at work."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw

from moe_sampler.kernels.shift import shift_sigma

from ..sampling.plan import PlanStep, SamplingPlan
from .images import check_writable, save_png
from .sheets import BACKGROUND, FAINT, INK, scalable_font

__all__ = ["draw_plan", "expert_colors", "expert_summary", "mixed_color", "pale"]

Color = tuple[int, int, int]

_OWN_COLORS = {"sol": "#dd8a1f", "lune": "#3d6db5"}
_MORE_COLORS = ("#2f9d78", "#b5527e", "#7a62b8", "#8c8c3a", "#4fa3c7", "#a2583a")
_GRID = (226, 226, 222)

_FINE = 3  # drawn this much larger and reduced, for smooth lines
_WIDTH, _HEIGHT = 1060, 500  # at least so high
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 742, 78, 366  # of the curve's field
_STRIP = (394, 434)  # top and bottom of the experts' strip
_LEGEND = 778


def expert_colors(plan: SamplingPlan) -> dict[str, Color]:
    """A colour for each expert, in order of appearance; Sol's and Lune's are always the same."""
    more = itertools.cycle(_MORE_COLORS)
    return {name: _rgb(_OWN_COLORS.get(name) or next(more)) for name in plan.experts}


def _rgb(name: str) -> Color:
    red, green, blue = ImageColor.getrgb(name)[:3]
    return red, green, blue


def mixed_color(step: PlanStep, colors: Mapping[str, Color]) -> Color:
    """The colours of a step's experts, mixed by their weights."""
    red, green, blue = (round(sum(c.weight * colors[c.name][i] for c in step.calls)) for i in range(3))
    return red, green, blue


def _lead(step: PlanStep) -> str:
    return max(step.calls, key=lambda call: call.weight).name


def pale(color: Color, share: float) -> Color:
    """`share` of the colour over the background."""
    red, green, blue = (round(b + share * (c - b)) for c, b in zip(color, BACKGROUND, strict=True))
    return red, green, blue


def _handoffs(plan: SamplingPlan) -> list[tuple[int, int]]:
    """(first, end) of the mixed steps around every change of the lead; first = end at a hard one."""
    found = []
    for i, (before, step) in enumerate(itertools.pairwise(plan.steps), start=1):
        if _lead(before) == _lead(step):
            continue
        first = end = i
        while first > 0 and len(plan.steps[first - 1].calls) > 1:
            first -= 1
        while end < len(plan) and len(plan.steps[end].calls) > 1:
            end += 1
        found.append((first, end))
    return found


def _shift(plan: SamplingPlan, name: str) -> float | None:
    """k of an expert's shifted sigmas, read off its levels: the right k leaves them evenly spaced unshifted.

    None where it has fewer than three levels, sees a discrete grid, or they aren't spaced by any k.
    """
    own = [step for step in plan.steps if _lead(step) == name and not step.corrects]
    if any(isinstance(call.timestep, int) for step in own for call in step.calls):
        return None
    levels = [step.level.noise for step in own] + [own[-1].target.noise]
    if len(levels) < 3:
        return None

    def bend(k: float) -> float:
        first, second, third = (shift_sigma(s, 1.0 / k) for s in levels[-3:])
        return first - 2.0 * second + third

    low, high = 1e-3, 1e3
    if bend(low) * bend(high) > 0.0:
        return None
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if bend(middle) * bend(high) <= 0.0 else (low, middle)
    even = [shift_sigma(s, 1.0 / low) for s in levels]
    gaps = [a - b for a, b in itertools.pairwise(even)]
    return low if max(gaps) - min(gaps) < 1e-6 else None


def _range(values: Sequence[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"


def expert_summary(plan: SamplingPlan, name: str) -> list[str]:
    """What a plan says of one expert, in a few short lines: steps, guidance, solver, timesteps, levels,
    or the shift where they show one.
    """
    steps = [step for step in plan.steps if any(call.name == name for call in step.calls)]
    calls = [call for step in steps for call in step.calls if call.name == name]
    own = [step for step in steps if _lead(step) == name]
    solvers = list(dict.fromkeys(step.solver for step in own if not step.corrects))
    mixed = sum(len(step.calls) > 1 for step in steps)
    count = sum(not step.corrects for step in steps)
    lines = [f"{count} step{'s' * (count != 1)}"]
    if mixed:
        lines[0] += f", {mixed} of them shared"
    scales = [call.guidance_scale for call in calls]
    lines.append("no guidance" if max(scales) == min(scales) == 1.0 else f"guidance {_range(scales, 'g')}")
    kinds = dict.fromkeys(str(call.guider) for call in calls if call.guider)
    if kinds:
        lines[-1] += f", {', '.join(kinds)}"
    rescaled = max(call.guidance_rescale for call in calls)
    if rescaled:
        lines[-1] += f", rescaled {rescaled:g}"
    if solvers:
        fresh = any(step.coefficients["n"] for step in own)
        lines.append(f"solver {', '.join(solvers)}" + (" (adds noise)" if fresh else ""))
    first, last = calls[0].timestep, calls[-1].timestep
    lines.append(f"timesteps {first:.4g} to {last:.4g}" if len(calls) > 1 else f"timestep {first:.4g}")
    reusing = sum(call.reuses for call in calls)
    if reusing:
        lines.append(f"{reusing} of {len(calls)} calls reuse features")
    levels = _levels(plan, name)
    k = _shift(plan, name) if own else None
    if levels not in (None, "uniform"):
        lines.append(f"levels {levels}")
    elif k is not None:
        lines.append(f"shift {k:.3g}")
    return lines


def _levels(plan: SamplingPlan, name: str) -> str | None:
    """What an expert's levels were asked to be, if anything was."""
    made = () if plan.made_from is None or plan.made_from.noise_levels else plan.made_from.experts
    levels = next((expert.levels for expert in made if expert.name == name), None)
    return levels if levels is None or isinstance(levels, str) else "as listed"


class _Canvas:
    """Drawing in the figure's own pixels on an enlarged image."""

    def __init__(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._image = Image.new("RGB", (width * _FINE, height * _FINE), BACKGROUND)
        self._draw = ImageDraw.Draw(self._image)

    def text(self, x: float, y: float, text: str, size: int, color: Color = INK, anchor: str = "la") -> None:
        font = scalable_font(size * _FINE)
        self._draw.text((x * _FINE, y * _FINE), text, fill=color, font=font, anchor=anchor)

    def text_width(self, text: str, size: int) -> float:
        return scalable_font(size * _FINE).getlength(text) / _FINE

    def line(self, points: Sequence[tuple[float, float]], color: Color, width: float = 1.0) -> None:
        scaled = [(x * _FINE, y * _FINE) for x, y in points]
        self._draw.line(scaled, fill=color, width=max(1, round(width * _FINE)), joint="curve")

    def dashes(self, start: tuple[float, float], end: tuple[float, float], color: Color, dash: float) -> None:
        length = math.dist(start, end)
        for i in range(0, int(length / dash) + 1, 2):
            shares = i * dash / length, min((i + 1) * dash / length, 1.0)
            ends = [(start[0] + u * (end[0] - start[0]), start[1] + u * (end[1] - start[1])) for u in shares]
            self.line(ends, color, 1.2)

    def polygon(self, points: Sequence[tuple[float, float]], color: Color) -> None:
        self._draw.polygon([(x * _FINE, y * _FINE) for x, y in points], fill=color)

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        edges = [round(edge * _FINE) for edge in (left, top, right, bottom)]
        self._draw.rectangle(
            (edges[0], edges[1], max(edges[2] - 1, edges[0]), max(edges[3] - 1, edges[1])), fill=color
        )

    def dot(self, x: float, y: float, radius: float, fill: Color, outline: Color) -> None:
        box = [v * _FINE for v in (x - radius, y - radius, x + radius, y + radius)]
        self._draw.ellipse(box, fill=fill, outline=outline, width=round(1.6 * _FINE))

    def finished(self) -> Image.Image:
        return self._image.resize(self._size, Image.Resampling.LANCZOS)


def _draw_axes(canvas: _Canvas, count: int) -> None:
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(tick)
        canvas.line([(_LEFT, y), (_RIGHT, y)], _GRID)
        canvas.text(_LEFT - 10, y, f"{tick:g}", 13, FAINT, "rm")
    canvas.text(_LEFT - 10, _TOP - 26, "noise", 13, FAINT, "rm")
    canvas.text(_LEFT - 10, sum(_STRIP) / 2, "expert", 13, FAINT, "rm")
    every = next(e for e in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if count / e <= 20)
    for step in range(0, count, every):
        canvas.text(_x(step + 0.5, count), _STRIP[1] + 8, str(step), 13, FAINT, "ma")
    canvas.text((_LEFT + _RIGHT) / 2, _STRIP[1] + 30, "step", 13, FAINT, "ma")


def _x(step: float, count: int) -> float:
    return _LEFT + (_RIGHT - _LEFT) * step / count


def _y(noise: float) -> float:
    return _BOTTOM + (_TOP - _BOTTOM) * noise


def _draw_curve(canvas: _Canvas, plan: SamplingPlan, colors: Mapping[str, Color]) -> None:
    """Every step as the way from its level to its target, over the middle of its column and the next's."""
    count = len(plan)
    ends = [(_x(i, count), _y(step.level.noise)) for i, step in enumerate(plan.steps)]
    ends.append((_x(count, count), _y(plan.steps[-1].target.noise)))
    for step, (start, end) in zip(plan.steps, itertools.pairwise(ends), strict=True):
        fill = pale(mixed_color(step, colors), 0.16)
        canvas.polygon([start, end, (end[0], _BOTTOM), (start[0], _BOTTOM)], fill)
    canvas.line([(_LEFT, _BOTTOM), (_RIGHT, _BOTTOM)], FAINT)
    _draw_handoffs(canvas, plan)
    for step, (start, end) in zip(plan.steps, itertools.pairwise(ends), strict=True):
        canvas.line([start, end], mixed_color(step, colors), 2.6)
    radius = min(4.2, max(1.8, 0.22 * (_RIGHT - _LEFT) / count))
    for step, point in zip(plan.steps, ends, strict=False):
        color = mixed_color(step, colors)
        canvas.dot(*point, radius, BACKGROUND if step.corrects else color, color)
    canvas.dot(*ends[-1], radius, BACKGROUND, mixed_color(plan.steps[-1], colors))


def _draw_levels(canvas: _Canvas, plan: SamplingPlan, colors: Mapping[str, Color]) -> None:
    """Beside the field a mark for every step's level, which shows how they are spaced."""
    for step in plan.steps:
        if not step.corrects:
            y = _y(step.level.noise)
            canvas.line([(_RIGHT + 9, y), (_RIGHT + 19, y)], mixed_color(step, colors), 1.4)


def _labels(canvas: _Canvas, wanted: Sequence[tuple[float, str]]) -> tuple[list[tuple[float, str]], bool]:
    """(centre, text) of the labels that fit on one line, each about its place, and whether all do."""
    placed, free = [], float(_LEFT)
    for middle, text in wanted:
        half = canvas.text_width(text, 13) / 2
        centre = min(max(middle, _LEFT + half), _RIGHT - half)
        if centre - half >= free:
            placed.append((centre, text))
            free = centre + half + 10
    return placed, len(placed) == len(wanted)


def _draw_handoffs(canvas: _Canvas, plan: SamplingPlan) -> None:
    """Where the lead changes, and at which noise levels as far as there is room to say so."""
    count, full, short = len(plan), [], []
    noises = [step.level.noise for step in plan.steps] + [plan.steps[-1].target.noise]
    for first, end in _handoffs(plan):
        edges = [(_x(i, count), noises[i]) for i in dict.fromkeys((first, end))]
        for x, noise in edges:
            canvas.dashes((x, _TOP - 12), (x, _STRIP[1]), FAINT, 5)
            canvas.dashes((_LEFT, _y(noise)), (x, _y(noise)), FAINT, 5)
        middle = sum(x for x, _ in edges) / len(edges)
        levels = " to ".join(f"{noise:.2f}" for _, noise in edges)
        full.append((middle, f"{'crossfade,' if end > first else 'handoff at'} noise {levels}"))
        short.append((middle, levels))
    placed, all_fit = _labels(canvas, full)
    for centre, text in placed if all_fit else _labels(canvas, short)[0]:
        canvas.text(centre, _TOP - 17, text, 13, INK, "md")


def _draw_strip(canvas: _Canvas, plan: SamplingPlan, colors: Mapping[str, Color]) -> None:
    """Each step's experts, stacked by weight, in the order of their appearance; pale where they reuse
    features."""
    count, (top, bottom) = len(plan), _STRIP
    width = (_RIGHT - _LEFT) / count
    gap = 1.0 if width > 8 else 0.0
    for i, step in enumerate(plan.steps):
        y = top
        for name in plan.experts:
            call = next((call for call in step.calls if call.name == name), None)
            weight = 0.0 if call is None else call.weight
            if call is None or not weight:
                continue
            below = y + weight * (bottom - top)
            color = pale(colors[name], 0.45) if call.reuses else colors[name]
            canvas.box(_x(i, count) + gap / 2, y, _x(i + 1, count) - gap / 2, below, color)
            text = f"{weight:.0%}"
            if 0.3 < weight < 1.0 and width > canvas.text_width(text, 11) + 4:
                canvas.text(_x(i + 0.5, count), (y + below) / 2, text, 11, (255, 255, 255), "mm")
            y = below


def draw_plan(plan: SamplingPlan, path: str | Path | None = None) -> Image.Image:
    """The noise level of every step, who works there with what weight, handoffs, and the experts' settings.

    Hollow dots are a Heun step's second evaluations, and the end; the marks on the right are the levels.

    Args:
        plan: any plan.
        path: a PNG to write as well; a whole file or none.

    Raises:
        ValueError: `path` can't be written.
    """
    if path is not None:
        check_writable(Path(path))
    colors, legend = expert_colors(plan), {name: expert_summary(plan, name) for name in plan.experts}
    canvas = _Canvas(_WIDTH, max(_HEIGHT, _TOP + sum(36 + 20 * len(lines) for lines in legend.values())))
    count = plan.steps_and_cost()
    canvas.text(_RIGHT, 20, count, 14, FAINT, "ra")
    *others, last = (name.title() for name in plan.experts)
    title = f"{', '.join(others)} and {last}" if others else last
    room = _RIGHT - _LEFT - canvas.text_width(count, 14) - 20
    canvas.text(_LEFT, 16, title if canvas.text_width(title, 19) < room else f"{len(legend)} experts", 19)
    _draw_axes(canvas, len(plan))
    _draw_curve(canvas, plan, colors)
    _draw_levels(canvas, plan, colors)
    _draw_strip(canvas, plan, colors)
    y = _TOP
    for name, lines in legend.items():
        canvas.box(_LEGEND, y, _LEGEND + 14, y + 14, colors[name])
        canvas.text(_LEGEND + 24, y + 7, name.title(), 16, INK, "lm")
        for line in lines:
            y += 20
            canvas.text(_LEGEND + 24, y + 7, line, 13, FAINT, "lm")
        y += 36
    image = canvas.finished()
    if path is not None:
        save_png(image, Path(path))
    return image
