"""The page's components, where they stand and what they are called. What they do is in `acting`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from ..sampling.scheduler_names import KNOWN_NAMES
from ..sampling.solvers import SOLVERS
from ..sampling.spacing_names import SPACING_NAMES
from .form import HYBRID, LARGEST_SEED, STUDENT
from .look import title
from .planning import Cast

__all__ = ["Page", "lay_out"]

_COLORS = {"sol": "#dd8a1f", "lune": "#3d6db5"}
_OTHER_COLOR = "#2f9d78"
_HINT = '<div class="status">Type a prompt and press Enter. Escape cancels.</div>'
_ARTS = {
    "epsilon": "predicts the noise",
    "v_prediction": "v-prediction",
    "flow_prediction": "rectified flow",
    "sample": "predicts the picture",
}


@dataclass
class Page:
    """Everything on the page that something happens to.

    Args:
        fields: by the form's names.
        wrong: by the same names, what is said beside a field.
        groups: blocks that are shown while a field in them counts, with the fields' names.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, Any] = field(default_factory=dict)
    groups: list[tuple[Any, Sequence[str]]] = field(default_factory=list)
    blocks: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, component: Any) -> None:
        """A field, and room to say what is wrong with it right below."""
        self.fields[name] = component
        self.wrong[name] = gr.HTML(
            visible=False, elem_classes="wrong", elem_id=f"wrong_{name}", padding=False
        )


def lay_out(cast: Cast) -> Page:
    """The components, inside `gr.Blocks`."""
    page, form = Page(), cast.form
    first = form.first
    gr.HTML(_heading(cast), elem_id="title", padding=False)
    with gr.Column(elem_id="main"):
        with gr.Column(elem_id="ask"):
            _ask(page, first, len(form.names) == 2)
        with gr.Column(elem_id="show"):
            _show(page)
        with gr.Column(elem_id="set"):
            _set(page, cast, first)
    with gr.Column(visible=False) as kept:
        with gr.Row(equal_height=True):
            gr.Markdown("### Gallery")
            remove = gr.Button("Remove the shown one", size="sm", scale=0, min_width=180, elem_id="remove")
        gallery = gr.Gallery(
            show_label=False,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            buttons=[],
            interactive=False,
            elem_id="gallery",
        )
    page.blocks |= {"kept": kept, "remove": remove, "gallery": gallery}
    page.fields = {name: page.fields[name] for name in first}
    counted = form.shown(first["maker"])
    for group, names in page.groups:
        group.visible = bool(counted & {*names})
    return page


def _heading(cast: Cast) -> str:
    if cast.model.is_demo:
        from ..demo import known_words

        text = (
            "The demo experts know castles, portraits and city streets, in "
            f"{len(known_words())} words: towers, trees, lakes, coats, dusk, night ..."
        )
    else:
        text = cast.model.base or f"preset {cast.model.preset}"
    names = " and ".join(name.title() for name in cast.form.names)
    return f"<h1>{names} paint together</h1><p>{text}</p>"


def _ask(page: Page, first: dict[str, Any], comparable: bool) -> None:
    page.add(
        "prompt",
        gr.Textbox(
            label="Prompt",
            placeholder="a castle with two towers, at dusk",
            lines=1,
            max_lines=4,
            autofocus=True,
            elem_id="prompt",
        ),
    )
    with gr.Row():
        page.blocks["generate"] = gr.Button("Generate", variant="primary", min_width=90, elem_id="generate")
        if comparable:
            page.blocks["compare"] = gr.Button("Compare", min_width=90, elem_id="compare")
        page.blocks["cancel"] = gr.Button("Cancel", variant="stop", min_width=90, elem_id="cancel")


def _show(page: Page) -> None:
    blocks = page.blocks
    blocks["picture"] = gr.Image(
        label="Picture",
        show_label=False,
        interactive=False,
        height=420,
        buttons=["download", "fullscreen"],
        elem_id="picture",
        alt_text="The picture, or what the experts believe it is by now",
    )
    blocks["status"] = gr.HTML(_HINT, elem_id="status", padding=False)
    blocks["plan"] = gr.Image(
        label="Plan",
        show_label=False,
        interactive=False,
        format="png",
        buttons=["fullscreen"],
        elem_id="plan",
        alt_text="The plan: how the noise goes down step by step, and who is at work",
    )
    blocks["plan_words"] = gr.HTML(elem_id="plan_words", padding=False)
    page.wrong[""] = gr.HTML(visible=False, elem_classes="wrong", elem_id="wrong_plan", padding=False)
    with gr.Accordion("What the experts believed, step by step", open=False):
        blocks["sheet"] = gr.Image(
            show_label=False,
            buttons=["download", "fullscreen"],
            interactive=False,
            elem_id="sheet",
            alt_text="Every step",
        )
    with gr.Accordion("Make this picture again", open=False, elem_id="again"):
        blocks["command"] = gr.Code(
            label="Command line", language="shell", interactive=False, lines=1, elem_id="command"
        )
        blocks["python"] = gr.Code(label="Python", language="python", interactive=False, elem_id="python")


def _set(page: Page, cast: Cast, first: dict[str, Any]) -> None:
    form = cast.form
    makers = [(_maker(name, form.names), name) for name in form.makers]
    page.add("maker", gr.Radio(makers, value=first["maker"], label="Who paints", visible=len(makers) > 1))
    with gr.Row(elem_id="seed_row"):
        with gr.Column(min_width=150):
            page.add("seed", gr.Number(first["seed"], label="Seed", precision=None, elem_id="seed"))
        with gr.Column(min_width=140, scale=0):
            page.blocks["dice"] = gr.Button("Another seed", elem_id="dice")
    for i, name in enumerate(form.handoffs):
        before, after = form.names[i].title(), form.names[i + 1].title()
        with gr.Column() as group:
            page.add(
                name,
                gr.Slider(
                    *(0.01, 0.99, first[name]),
                    step=0.01,
                    label=f"{before} hands over to {after} at",
                    info="A noise level: 1 is pure noise, 0 the picture",
                    elem_id=name,
                ),
            )
        page.groups.append((group, [name]))
    page.add(
        "steps",
        gr.Slider(
            *(1, 100, first["steps"]),
            step=1,
            label="Steps",
            info="In all, shared out between the experts" if len(form.names) > 1 else None,
            elem_id="steps",
        ),
    )
    with gr.Row():
        for name in form.experts:
            with gr.Column(min_width=190) as group:
                _expert(page, cast, name, first)
            page.groups.append((group, [f"guidance_{name}"]))
    _rest(page, cast, first)


def _maker(name: str, names: Sequence[str]) -> str:
    if name == HYBRID:
        return " + ".join(n.title() for n in names)
    return "The student" if name == STUDENT else f"{name.title()} alone"


def _expert(page: Page, cast: Cast, name: str, first: dict[str, Any]) -> None:
    if name == STUDENT:
        text = "the student, taught by the experts"
    else:
        config = cast.training[0][name]
        flow = "FlowMatch" in config["_class_name"]
        text = _ARTS["flow_prediction" if flow else config.get("prediction_type", "epsilon")]
    gr.HTML(
        title("TinyFlux" if name == STUDENT else name.title(), text, _COLORS.get(name, _OTHER_COLOR)),
        padding=False,
    )
    if name != STUDENT:
        with gr.Column() as group:
            page.add(
                f"steps_{name}",
                gr.Textbox(label="Own steps", placeholder="shared out", elem_id=f"steps_{name}"),
            )
        page.groups.append((group, [f"steps_{name}"]))
    own = cast.own_solvers.get(name, "")
    page.add(
        f"solver_{name}",
        gr.Dropdown(
            [
                (f"{own} (its own)", ""),
                *((solver, solver) for solver in dict.fromkeys((*SOLVERS, *KNOWN_NAMES))),
            ],
            value="",
            label="Solver",
            allow_custom_value=True,
            elem_id=f"solver_{name}",
        ),
    )
    page.add(
        f"levels_{name}",
        gr.Dropdown(
            [("its own", ""), *((spacing, spacing) for spacing in SPACING_NAMES)],
            value="",
            label="Levels",
            allow_custom_value=True,
            elem_id=f"levels_{name}",
        ),
    )
    scale = first[f"guidance_{name}"]
    page.add(
        f"guidance_{name}",
        gr.Slider(*(0, max(15, scale), scale), step=0.1, label="Guidance", elem_id=f"guidance_{name}"),
    )
    if f"weight_{name}" in cast.form.weights:
        with gr.Column() as group:
            page.add(
                f"weight_{name}",
                gr.Slider(
                    *(0, 1, 0),
                    step=0.05,
                    label="Share beside the student",
                    elem_id=f"weight_{name}",
                ),
            )
        page.groups.append((group, [f"weight_{name}"]))


def _rest(page: Page, cast: Cast, first: dict[str, Any]) -> None:
    with gr.Accordion("From a picture", open=False, elem_id="from_picture") as group:
        page.add(
            "image",
            gr.Image(
                label="Start from this picture",
                buttons=["fullscreen"],
                type="filepath",
                sources=["upload", "clipboard"],
                height=220,
                elem_id="image",
            ),
        )
        page.add(
            "strength",
            gr.Slider(
                *(0.01, 1, first["strength"]),
                step=0.01,
                label="Strength",
                info="How much of it is changed: the share of the steps that are run",
                elem_id="strength",
            ),
        )
    page.groups.append((group, ["image"]))
    with gr.Accordion("Size, speed and what is not wanted", open=False, elem_id="more"):
        page.add(
            "negative", gr.Textbox(label="Not wanted", placeholder="a negative prompt", elem_id="negative")
        )
        with gr.Row():
            for side in ("width", "height"):
                with gr.Column(min_width=120):
                    label = f"{side.title()} in pixels"
                    page.add(side, gr.Textbox(label=label, placeholder="the model's own", elem_id=side))
        with gr.Column() as group:
            page.add(
                "speed",
                gr.Radio(
                    [
                        ("As it is", "none"),
                        ("Fast number format", "fast"),
                        ("Compiled: minutes at first", "max"),
                    ],
                    value=first["speed"],
                    label="Speed",
                    elem_id="speed",
                ),
            )
            page.add(
                "reuse",
                gr.Slider(
                    *(1, 8, 1),
                    step=1,
                    label="A full pass every so many steps",
                    info="The others reuse its deep features, at a tenth of the cost",
                    elem_id="reuse",
                ),
            )
        page.groups.append((group, ["speed", "reuse"]))


def another_seed() -> int:
    """Short enough to be remembered."""
    return random.randrange(min(LARGEST_SEED, 10**6))
