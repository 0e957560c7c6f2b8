"""A plan as a table for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from ..sampling.plan import SamplingPlan
from .plan_figure import expert_colors, mixed_color

__all__ = ["plan_table"]


def plan_table(plan: SamplingPlan) -> Table:
    """The cells of a printed plan, with the experts in their colours and a rule at every handoff."""
    header, rows = plan._display_rows()
    colors = expert_colors(plan)
    table = Table(title=str(plan).splitlines()[0], title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name, justify="left" if name in ("expert", "solver") else "right", no_wrap=True)
    for index, (step, cells) in enumerate(zip(plan.steps, rows, strict=True)):
        following = plan.steps[index + 1] if index + 1 < len(plan) else step
        changes = {call.name for call in step.calls} != {call.name for call in following.calls}
        style = "rgb({},{},{})".format(*mixed_color(step, colors))
        styled = (
            Text(cell, style if name == "expert" else "") for name, cell in zip(header, cells, strict=True)
        )
        table.add_row(*styled, end_section=changes)
    return table
