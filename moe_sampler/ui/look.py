"""How the page looks: colours, layout and keys. Fonts are the reader's own; nothing is fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..viewing.plan_figure import expert_colors, expert_summary, mixed_color, pale

if TYPE_CHECKING:
    from ..sampling.plan import SamplingPlan

__all__ = ["CSS", "HEAD", "plan_words", "progress", "theme", "title"]

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#title { margin: 0 0 2px; }
#title h1 { font-size: 1.35rem; margin: 0; line-height: 1.3; }
#title p { margin: 2px 0 0; color: var(--body-text-color-subdued); }
#main { display: grid; gap: 16px 24px; align-items: start;
  grid-template-columns: minmax(0, 5fr) minmax(0, 6fr);
  grid-template-areas: "ask show" "set show"; grid-template-rows: auto 1fr; }
#ask { grid-area: ask; } #set { grid-area: set; } #show { grid-area: show; }
.wrong p, .wrong { color: #b3261e; font-size: .9rem; margin: 0; }
.dark .wrong, .dark .wrong p { color: #ff8a80; }
.wrong p.note, .note { color: var(--body-text-color-subdued); font-size: .9rem; margin: 0; }
.expert { border-left: 4px solid var(--own, #888); padding-left: 10px; }
.expert h3 { margin: 0; font-size: 1rem; }
.expert p { margin: 0; color: var(--body-text-color-subdued); font-size: .85rem; }
.bar { display: flex; gap: 1px; height: 8px; margin: 2px 0 6px; }
.bar i { flex: 1; border-radius: 1px; }
.status { min-height: 2.6em; font-size: .95rem; }
.status .faint { color: var(--body-text-color-subdued); }
.plan-words { font-size: .9rem; margin: 0; padding: 0; list-style: none; }
.plan-words li { display: flex; gap: 8px; align-items: baseline; margin: 2px 0; }
.plan-words b { white-space: nowrap; }
.plan-words b::before { content: ""; display: inline-block; width: 10px; height: 10px; margin-right: 6px;
  background: var(--own); }
#plan { overflow-x: auto !important; }
#seed_row { align-items: end; } #dice { font-weight: 500; padding: 8px; }
#ask button { font-weight: 500; }
.gap, .form { gap: 10px; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)) !important; }
#gallery .grid-wrap { min-height: 0 !important; height: auto !important; }
#gallery .thumbnail-lg { aspect-ratio: 1; }
button:focus-visible, input:focus-visible, textarea:focus-visible { outline: 2px solid #3d6db5 !important;
  outline-offset: 1px; }
@media (max-width: 760px) {
  .gradio-container { padding: 10px !important; }
  #main { grid-template-columns: minmax(0, 1fr); grid-template-rows: none;
    grid-template-areas: "ask" "show" "set"; }
  #picture { height: min(420px, 92vw) !important; }
  #plan button, #plan img { width: 640px !important; max-width: none !important; }
}
"""

HEAD = """
<script>
document.addEventListener("keydown", (event) => {
  const press = (id) => document.querySelector("button#" + id)?.click();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) press("generate");
  if (event.key === "Escape") press("cancel");
});
</script>
"""


def theme() -> Any:
    """Gradio's plainest, in the experts' colours."""
    from gradio import themes

    blue = themes.Color(
        *("#f2f6fb", "#e3ebf6", "#c5d5ec", "#9db8dd", "#6d93c9", "#3d6db5"),
        *("#345f9f", "#2c5087", "#25426f", "#1d3457", "#16283f"),
        name="lune",
    )
    return themes.Base(
        primary_hue=blue,
        secondary_hue=blue,
        neutral_hue="stone",
        font=_SANS,
        font_mono=_MONO,
        radius_size="sm",
    ).set(
        block_border_width="1px",
        block_label_text_weight="500",
        block_title_text_weight="500",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
    )


def title(name: str, text: str, color: str) -> str:
    """An expert's heading, beside its colour."""
    return f'<div class="expert" style="--own: {color}"><h3>{name}</h3><p>{text}</p></div>'


def _css(color: tuple[int, int, int]) -> str:
    return "rgb({}, {}, {})".format(*color)


def progress(plan: SamplingPlan, done: int, text: str) -> str:
    """A bar of the run's steps in the experts' colours, those to come paler, and a line below it."""
    colors = expert_colors(plan)
    own = [mixed_color(step, colors) for step in plan.steps]
    parts = "".join(
        f'<i style="background: {_css(color if i < done else pale(color, 0.25))}"></i>'
        for i, color in enumerate(own)
    )
    told = f'role="progressbar" aria-valuemin="0" aria-valuemax="{len(plan)}" aria-valuenow="{done}"'
    return f'<div class="status"><div class="bar" {told} aria-label="steps">{parts}</div>{text}</div>'


def plan_words(plan: SamplingPlan) -> str:
    """What the drawing says, to be read at any width and aloud."""
    colors = expert_colors(plan)
    lines = (
        f'<li style="--own: {_css(colors[name])}"><b>{name.title()}</b>'
        f"<span>{' · '.join(expert_summary(plan, name))}</span></li>"
        for name in plan.experts
    )
    return f'<ul class="plan-words">{"".join(lines)}<li>{plan.steps_and_cost()}</li></ul>'
