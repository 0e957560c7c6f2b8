"""A `StudentPipeline` as one folder, in diffusers' layout: the student, its VAE and text encoders, a card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers

from moe_sampler.loading.folders import CARD, INDEX
from moe_sampler.loading.hub import Place, component_patterns
from moe_sampler.publishing.card import Example, card_text, loading, quoted, table, write_card
from moe_sampler.publishing.examples import save_examples
from moe_sampler.publishing.upload import Address, loading_by_diffusers
from moe_sampler.tinyflux.model.loading import STUDENT_FOLDER, holds_pipeline
from moe_sampler.tinyflux.model.published import CONFIG_SHOWN, REFERENCE, describe_student

if TYPE_CHECKING:
    from moe_sampler.tinyflux.sampling.pipeline import StudentPipeline

__all__ = ["find_pipeline", "write_pipeline"]

_ENCODERS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
_MODULE = "pipeline"
_CODE = '''"""The class of this folder's pipeline, for diffusers' DiffusionPipeline.from_pretrained.

It is in the package moe-sampler, whose StudentPipeline.from_pretrained loads the folder without this file.
"""

from moe_sampler.tinyflux.sampling.as_diffusers import StudentDiffusionPipeline


class StudentPipeline(StudentDiffusionPipeline):
    pass
'''


def find_pipeline(place: Place) -> Path | None:
    """The folder on this machine of a pipeline that was saved whole; None for a student alone."""
    if not holds_pipeline(place):
        return None
    parts = (STUDENT_FOLDER, *_ENCODERS)
    return place.local([INDEX, CARD, *(p for part in parts for p in component_patterns(part))])


def write_pipeline(
    pipe: StudentPipeline,
    final: Path | None,
    examples: Sequence[str],
    license: str | None,
    folder: Path,
    address: Address,
) -> None:
    """final: where the folder's files get their places."""
    student, encoders = pipe.student, pipe.encoders
    if getattr(student, "peft_config", None):
        raise ValueError("the student has LoRA adapters: call fuse_lora() or unload_lora_weights() first")
    title = Path(address.source).name
    student.write_weights(
        folder / STUDENT_FOLDER, describe_student(title, student.config, license, scale=encoders.scale)
    )
    config_file = folder / STUDENT_FOLDER / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # They are beside it now, wherever they came from.
    config["encoders"] = None if encoders.t5 is None else {"t5_length": encoders.t5.max_length}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    parts: dict[str, Any] = {"vae": encoders.vae, "text_encoder": encoders.clip.model}
    parts["tokenizer"] = encoders.clip.tokenizer
    if encoders.t5 is not None:
        parts |= {"text_encoder_2": encoders.t5.model, "tokenizer_2": encoders.t5.tokenizer}
    index: dict[str, Any] = {"_class_name": [_MODULE, "StudentPipeline"]}
    index |= {"_diffusers_version": diffusers.__version__}
    index[STUDENT_FOLDER] = [REFERENCE.removesuffix(".py"), type(student).__name__]
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = "diffusers" if name == "vae" else "transformers"
        index[name] = [library, type(part).__name__]
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / f"{_MODULE}.py").write_text(_CODE, encoding="utf-8")
    drawn = _draw(pipe, folder, examples, address)
    write_card(folder, _card(pipe, title, address, drawn, license), final)


def _draw(pipe: StudentPipeline, folder: Path, prompts: Sequence[str], address: Address) -> list[Example]:
    """Pictures of the prompts by the student alone, with its defaults."""
    if not prompts:
        return []
    alone: Any = type(pipe)(pipe.student, pipe.encoders)
    output = alone(list(prompts), seed=list(range(len(prompts))), batch_size=1)
    return save_examples(folder, prompts, output.images, output.plan, {"student": address.source})


def _card(
    pipe: StudentPipeline, title: str, address: Address, examples: Sequence[Example], license: str | None
) -> str:
    prompt = quoted(examples[0].prompt if examples else "a castle by a lake")
    size = {} if None not in pipe.sample_size else {"height": 512, "width": 512}
    more = "".join(f", {name}={side}" for name, side in size.items())
    sections = [
        "A TinyFlux, the student of moe-sampler, with the VAE and the text encoders it was trained with.",
        "## Loading",
        loading(
            "from moe_sampler.tinyflux import StudentPipeline",
            [
                f"pipe = StudentPipeline.from_pretrained({address.arguments})",
                f"image = pipe({prompt}{more}, seed=0).images[0]",
            ],
        ),
    ]
    sections += loading_by_diffusers(address)
    shown = {f"`{name}`": pipe.student.config[name] for name in CONFIG_SHOWN}
    return card_text(
        title,
        [*sections, "## Config", table(shown)],
        license=license,
        tags=["tinyflux"],
        examples=examples,
        library_name="diffusers",
        pipeline_tag="text-to-image",
    )
