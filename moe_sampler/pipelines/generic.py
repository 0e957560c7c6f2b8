"""What a saved pipeline's folder holds beside its components: the class's name as code, for diffusers' own
`DiffusionPipeline.from_pretrained`, and a card with pictures that says how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..loading.folders import INDEX, SHARED
from ..publishing.card import Example, card_text, loading, quoted, table
from ..publishing.upload import Address, loading_by_diffusers

if TYPE_CHECKING:
    from .hybrid import HybridPipeline

__all__ = ["draw_examples", "pipeline_card", "write_code_reference"]

_MODULE = "pipeline"

_CODE = '''"""The class of this folder's pipeline, for diffusers' DiffusionPipeline.from_pretrained.

It is in the package moe-sampler, whose HybridPipeline.from_pretrained loads the folder without this file.
"""

import moe_sampler


class HybridPipeline(moe_sampler.HybridPipeline):
    def __init__(
        self,
{arguments}
    ):
        super().__init__(
{passed}
        )
'''


def write_code_reference(folder: Path, experts: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Add `pipeline.py`, named in the folder's index.

    Args:
        folder: that a pipeline was saved to.
        experts: names.
        settings: default settings.
    """
    components = [*SHARED, *(f"{part}_{name}" for name in experts for part in ("unet", "scheduler"))]
    arguments = [f"{name}," for name in components] + [f"{name}=None," for name in settings]
    passed = [f"{name}={name}," for name in (*components, *settings)]
    indented = {
        "arguments": "\n".join(f"        {line}" for line in arguments),
        "passed": "\n".join(f"            {line}" for line in passed),
    }
    (folder / f"{_MODULE}.py").write_text(_CODE.format(**indented), encoding="utf-8")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["_class_name"] = [_MODULE, "HybridPipeline"]
    index["experts"] = ", ".join(experts)  # a list of words is a component to diffusers
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def draw_examples(
    pipe: HybridPipeline, folder: Path, prompts: Sequence[str], address: Address
) -> list[Example]:
    """Pictures of the prompts by the pipeline as it is, with its defaults, written into the folder with their
    settings, so that `--like` makes them again."""
    if not prompts:
        return []
    from ..publishing.examples import save_examples

    output = pipe(list(prompts), seed=list(range(len(prompts))), batch_size=1)
    names = pipe.expert_names
    defaults = {"num_inference_steps": pipe.config["num_inference_steps"]}
    if len(names) > 1:
        defaults["handoff"] = pipe.config["handoff"]
    defaults["guidance_scale"] = {name: pipe.config[f"{name}_guidance"] for name in names}
    place = {"model": address.source, "revision": address.revision, "subfolder": address.subfolder}
    return save_examples(folder, prompts, output.images, output.plan, {**defaults, **place})


def pipeline_card(
    experts: Sequence[str],
    settings: Mapping[str, Any],
    address: Address,
    examples: Sequence[Example] = (),
    license: str | None = None,
) -> str:
    """The card's text.

    Args:
        experts: names, from noise to data.
        settings: default settings.
        address: where the folder will be.
        examples: pictures in it.
        license: its identifier on the hub, if it is known.
    """
    several = "s" if len(experts) > 1 else ""
    prompt = quoted(examples[0].prompt if examples else "a castle by a lake")
    sections = [
        f"A pipeline of moe-sampler: expert{several} {' and '.join(experts)}"
        + (", which make one image together, in this order." if several else "."),
        "## Loading",
        loading(
            "from moe_sampler import HybridPipeline",
            [
                f"pipe = HybridPipeline.from_pretrained({address.arguments})",
                f"image = pipe({prompt}, seed=0).images[0]",
            ],
        ),
    ]
    sections += loading_by_diffusers(address)
    defaults = {f"`{name}`": value for name, value in settings.items() if name != "experts"}
    return card_text(
        f"Experts: {', '.join(experts)}",
        [*sections, "## Defaults", table(defaults)],
        license=license,
        examples=examples,
        library_name="diffusers",
        pipeline_tag="text-to-image",
    )
