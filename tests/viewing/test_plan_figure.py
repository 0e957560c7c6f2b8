"""The drawing of a plan, measured in its pixels, and the table for the terminal."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from moe_sampler import Boundary, Crossfade, Expert, Spans, plan
from moe_sampler.viewing.plan_figure import draw_plan, expert_colors, expert_summary
from moe_sampler.viewing.plan_table import plan_table

SOL, LUNE = Expert.sol(guidance_scale=2.5), Expert.lune(guidance_scale=4.0)
HYBRID = plan([SOL, LUNE], Boundary("sol", "lune", 0.7), steps={"sol": 8, "lune": 12})
FADE = plan([SOL, LUNE], Crossfade("sol", "lune", 0.85, 0.5), steps=24)


def where(image: Image.Image, color) -> np.ndarray:
    """[H, W]: which pixels have this colour, but for smoothing."""
    return np.abs(np.asarray(image).astype(int) - color).max(-1) < 40


def strip(image: Image.Image, compiled) -> dict[str, np.ndarray]:
    """By expert: its pixels in the band below the curve, left of the levels and the legend."""
    found = {name: where(image, color)[:, :748] for name, color in expert_colors(compiled).items()}
    wide = np.logical_or.reduce(list(found.values())).sum(1) > 400
    top, bottom = np.flatnonzero(wide)[[0, -1]]
    assert wide[top : bottom + 1].all() and 30 < bottom - top < 60
    return {name: mask[top : bottom + 1] for name, mask in found.items()}


def test_hard_handoffs_and_weights_show_in_the_strip():
    own = strip(draw_plan(HYBRID), HYBRID)
    assert own["sol"].sum() / (own["sol"].sum() + own["lune"].sum()) == pytest.approx(8 / 20, abs=0.01)
    assert np.flatnonzero(own["sol"].any(0))[-1] < np.flatnonzero(own["lune"].any(0))[0]
    own = strip(draw_plan(FADE), FADE)
    shares = {
        name: sum(call.weight for step in FADE.steps for call in step.calls if call.name == name) / 24
        for name in ("sol", "lune")
    }
    total = own["sol"].sum() + own["lune"].sum()
    for name, share in shares.items():
        # The percentages are written over the bars.
        assert own[name].sum() / total == pytest.approx(share, abs=0.03)
    both = own["sol"].any(0) & own["lune"].any(0)
    assert 0.2 < both.mean() < 0.5


@pytest.mark.parametrize("steps", [1, 4, 60, 400])
def test_the_curve_is_the_noise_levels(steps):
    """The line's height over every node, between the highest and the lowest that the plan has."""
    compiled = plan(Expert.lune(shift=3.0), steps=steps)
    (color,) = expert_colors(compiled).values()
    line = where(draw_plan(compiled), color)[:370, :748]
    left, right = np.flatnonzero(line.any(0))[[0, -1]]
    # The line begins and ends with a dot, whose outermost column is as high as its centre.
    top, bottom = (np.flatnonzero(line[:, x]).mean() for x in (left, right))
    for i, step in enumerate(compiled.steps):
        x = round(left + 3 + (right - left - 6) * i / steps)
        drawn = np.flatnonzero(line[:, x])
        expected = bottom - step.level.noise * (bottom - top)
        assert np.abs(drawn - expected).min() < 4, (i, expected, drawn)


def test_every_setting_changes_the_drawing():
    images = [
        draw_plan(compiled)
        for compiled in (
            HYBRID,
            plan([SOL, LUNE], Boundary("sol", "lune", 0.6), steps={"sol": 8, "lune": 12}),
            plan([SOL, Expert.lune(guidance_scale=1.0)], Boundary("sol", "lune", 0.7), steps=20),
            plan([SOL, Expert.lune(guidance_scale=4.0, shift=3.0)], Boundary("sol", "lune", 0.7), steps=20),
            plan([Expert.sol(solver="ddim"), LUNE], Boundary("sol", "lune", 0.7), steps=20),
        )
    ]
    assert len({image.tobytes() for image in images}) == len(images)
    assert draw_plan(HYBRID).tobytes() == images[0].tobytes()


def test_summaries():
    assert expert_summary(HYBRID, "sol") == [
        "8 steps",
        "guidance 2.5",
        "solver ddpm (adds noise)",
        f"timesteps 999 to {HYBRID.steps[7].calls[0].timestep}",
    ]
    assert expert_summary(HYBRID, "lune")[0] == "12 steps" and expert_summary(HYBRID, "lune")[-1] == "shift 2"
    mixed = sum(len(step.calls) == 2 for step in FADE.steps)
    assert expert_summary(FADE, "sol")[0].endswith(f"{mixed} of them shared")
    # On Sol's integer timesteps no shift is to be seen, nor with fewer than three levels.
    assert not any("shift" in line for line in expert_summary(FADE, "lune"))
    assert expert_summary(plan(Expert.lune(), steps=1), "lune")[:2] == ["1 step", "no guidance"]
    heun = plan(Expert.lune(solver="heun"), steps=4)
    assert expert_summary(heun, "lune")[0] == "4 steps" and heun.steps_and_cost().startswith("4 steps, 7 ")


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 3.0, 7.25])
@pytest.mark.parametrize("steps", [2, 3, 30])
def test_a_shift_is_read_off_the_levels(shift, steps):
    lines = expert_summary(plan(Expert.lune(shift=shift), steps=steps), "lune")
    assert lines[-1] == f"shift {shift:.3g}"
    uneven = plan(Expert.lune(), noise_levels=[1.0, 0.9, 0.3, 0.25, 0.1])
    assert "shift" not in expert_summary(uneven, "lune")[-1]


def test_many_experts_have_colours_of_their_own_and_room(tmp_path):
    experts = [Expert.lune(name=f"expert {i}") for i in range(6)]
    spans = Spans([(e.name, 1.0 - (i + 1) / 6 if i < 5 else 0.0) for i, e in enumerate(experts)])
    compiled = plan(experts, spans, steps=12)
    colors = expert_colors(compiled)
    assert len(set(colors.values())) == 6
    image = draw_plan(compiled, tmp_path / "six.png")
    legend = image.crop((778, 0, 792, image.height))
    assert all(where(legend, color).sum() > 150 for color in colors.values())
    assert image.height > draw_plan(HYBRID).height


def test_it_is_written_whole_or_not_at_all(tmp_path):
    image = draw_plan(HYBRID, tmp_path / "plan.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "plan.png")), np.asarray(image))
    for bad, message in ((tmp_path / "plan.jpg", "PNG"), (tmp_path / "none" / "plan.png", "create it first")):
        with pytest.raises(ValueError, match=message):
            draw_plan(HYBRID, bad)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


@pytest.mark.parametrize("compiled", [HYBRID, FADE, plan(Expert.sd15(guidance_scale=7.5), steps=3)])
def test_the_table_has_the_printed_plans_cells(compiled):
    console = Console(width=200, color_system=None, record=True, file=io.StringIO())
    console.print(plan_table(compiled))
    lines = console.export_text().splitlines()
    assert lines[0].strip() == str(compiled).splitlines()[0]
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[0] in "│┃"]
    printed = [re.split(r"\s{2,}", line.strip()) for line in str(compiled).splitlines()[1:]]
    assert cells == printed


def test_the_tables_experts_are_in_their_colours():
    console = Console(width=200, force_terminal=True, color_system="truecolor")
    with console.capture() as captured:
        console.print(plan_table(HYBRID))
    text = captured.get()
    for name, color in expert_colors(HYBRID).items():
        assert re.search(f"38;2;{color[0]};{color[1]};{color[2]}m{name}", text)
    assert text.count("├") == 1  # one rule: at the handoff
