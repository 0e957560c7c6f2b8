"""What is shown, once more: the command line and the Python that make it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..cli.models import DEMO, Model
from ..cli.options import PipelineOptions
from ..loading.presets import ExpertSource
from .form import levels_text

__all__ = ["command_line", "python_code"]

_PLAIN = ("height", "width", "reuse", "image", "strength", "sol_weight", "lune_weight")
_BY_NAME = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "solver": "solver",
    "levels": "levels",
}
_CALL = (
    *("num_inference_steps", "handoff", "guidance_scale", "solver", "levels", "negative_prompt"),
    *("height", "width", "expert", "reuse", "sol_weight", "lune_weight"),
)
_WIDTH = 74


def command_line(settings: Mapping[str, Any], where: PipelineOptions, encoders: Mapping[str, str]) -> str:
    """The command that makes the picture of these settings.

    Args:
        settings: as the picture remembers them.
        where: the options that the page was started with.
        encoders: likewise, of the student; by option.
    """
    compared, student = "prompts" in settings, settings.get("student")
    words = ["moe-sampler", *(["tinyflux", "sample"] if student else ["compare" if compared else "generate"])]
    (prompt,) = settings["prompts"] if compared else [settings["prompt"]]
    (seed,) = settings["seeds"] if compared else [settings["seed"]]
    flags = [("seed", seed), *_flags(settings), *_typed(where, bool(student))]
    flags += [*([("student", student)] if student != DEMO else []), *encoders.items()] if student else []
    flags += [("o", "compare.png" if compared else "picture.png")]
    options = [_flag(name, value) for name, value in flags]
    # What begins with a dash would be an option.
    placed = [prompt] if not prompt.startswith("-") else []
    lines = [" ".join(map(shlex.quote, [*words, *placed])), *options]
    lines += [] if placed else [f"-- {shlex.quote(prompt)}"]
    return _joined(lines)


def _joined(parts: Sequence[str]) -> str:
    """In lines that are no longer than they need to be."""
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) > _WIDTH:
            lines.append("")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n  ".join(lines)


def _flag(name: str, value: Any) -> str:
    dashes = "-" if len(name) == 1 else "--"
    typed = dashes + name.replace("_", "-")
    return typed if value is True else f"{typed} {shlex.quote(str(value))}"


def _flags(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(option, value) of what the form said."""
    if settings.get("expert", "hybrid") != "hybrid":
        yield "expert", settings["expert"]
    for key, name in _BY_NAME.items():
        value = settings.get(key)
        if isinstance(value, Mapping):
            yield from ((name, f"{expert}={_listed(own)}") for expert, own in value.items())
        elif value is not None:
            yield name, _listed(value)
    levels = settings.get("handoff")
    for level in levels if isinstance(levels, Sequence) else [levels] if levels is not None else []:
        yield "handoff", level
    if settings.get("negative_prompt"):
        yield "negative", settings["negative_prompt"]
    for key in _PLAIN:
        if settings.get(key) is not None:
            yield key, settings[key]
    if settings.get("speed", "none") != "none" and "student" not in settings:
        yield "speed", settings["speed"]


def _listed(value: Any) -> Any:
    return levels_text(value) if isinstance(value, list) else value


def _typed(where: PipelineOptions, student: bool) -> Iterator[tuple[str, Any]]:
    """(option, value) of what the page was started with; the speed is the form's."""
    refused = ("lora", "lora_text_encoder", "offload") if student else ()
    for field in dataclasses.fields(where):
        value = getattr(where, field.name)
        if value == field.default or field.name in ("speed", *refused):
            continue
        if value is False:  # of the options that the page is started with one can be turned off
            yield f"no-{field.name}", True
        for each in value if isinstance(value, list) else [value] if value is not False else []:
            yield field.name, each


def python_code(
    settings: Mapping[str, Any], model: Model, where: PipelineOptions, encoders: Mapping[str, str]
) -> str:
    """The program that makes the picture of these settings; it has the model's own size."""
    imports, load = _loading(settings, model, where)
    compared, student = "prompts" in settings, settings.get("student")
    call = {key: settings[key] for key in _CALL if settings.get(key) is not None}
    (prompt,) = settings["prompts"] if compared else [settings["prompt"]]
    (seed,) = settings["seeds"] if compared else [settings["seed"]]
    arguments = [_literal(prompt), f"seed={seed}", *_keywords(call)]
    if settings.get("image"):
        imports.add("from PIL import Image")
        arguments += [f"image=Image.open({_literal(settings['image'])})", f"strength={settings['strength']}"]
    lines = [load]
    if student:
        guided = settings.get("sol_weight") or settings.get("lune_weight")
        imports = {"from moe_sampler.tinyflux import StudentPipeline"} | (imports if guided else set())
        own = {} if settings["dtype"] == "float32" else {"dtype": settings["dtype"]}
        imports |= {"import torch"} if own else set()
        imports |= {"from moe_sampler.demo import student_path"} if student == DEMO else set()
        keywords = [*_keywords(encoders), *(f"{key}=torch.{name}" for key, name in own.items())]
        keywords += [] if where.device is None else [f"device={_literal(where.device)}"]
        made = _call(
            "pipe = StudentPipeline.from_pretrained",
            [
                "student_path()" if student == DEMO else _literal(student),
                *(["pipe"] if guided else []),
                *keywords,
            ],
        )
        lines = [load, made] if guided else [made]
    if compared:
        imports.add("from moe_sampler.pipelines.compare import compare")
        lines += [
            _call("comparison = compare", ["pipe", *arguments]),
            'comparison.sheet().save("compare.png")',
        ]
    else:
        lines += [_call("output = pipe", arguments), 'output.images[0].save("picture.png")']
    others = sorted(line for line in imports if not line.startswith("from moe_sampler"))
    ours = sorted(imports - {*others})
    return "\n".join([*others, *([""] if others else []), *ours, "", *lines]) + "\n"


def _loading(settings: Mapping[str, Any], model: Model, where: PipelineOptions) -> tuple[set[str], str]:
    """Imports, and the statements that load the pipeline."""
    imports = {"from moe_sampler import HybridPipeline"}
    arguments = []
    if model.is_demo:
        imports.add("from moe_sampler.demo import experts_path")
        arguments = ["experts_path()"]
    elif model.base is not None:
        arguments = [_literal(model.base)]
    if model.sources:
        imports = {"from moe_sampler import ExpertSource, HybridPipeline"}
    named = {
        "preset": model.preset,
        "experts": model.sources or None,
        "variant": where.variant,
        "revision": model.settings.get("revision"),
        "subfolder": model.settings.get("subfolder"),
        "dtype": None if settings["dtype"] == "float32" else settings["dtype"],
        "offload": None if where.offload == "none" else where.offload,
        "speed": settings.get("speed"),
        "device": where.device,
        "local_files_only": where.local_files_only or None,
    }
    arguments += _keywords({key: value for key, value in named.items() if value is not None})
    lines = [_call("pipe = HybridPipeline.from_pretrained", arguments)]
    for index, (expert, path, _) in enumerate(settings.get("loras", ())):
        own = {"expert": expert, "adapter_name": f"lora_{index}"}
        if settings.get("lora_text_encoder") is not None:
            own["text_encoder"] = settings["lora_text_encoder"]
        lines.append(_call("pipe.load_lora_weights", [_literal(path), *_keywords(own)]))
    by_expert: dict[str, list[tuple[str, float]]] = {}
    for index, (expert, _, scale) in enumerate(settings.get("loras", ())):
        by_expert.setdefault(expert, []).append((f"lora_{index}", scale))
    for expert, own in by_expert.items():
        named = [
            _literal([name for name, _ in own]),
            _literal([scale for _, scale in own]),
            f"expert={_literal(expert)}",
        ]
        lines.append(_call("pipe.set_adapters", named))
    return imports, "\n".join(lines)


def _keywords(given: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_literal(value)}" for key, value in given.items()]


def _literal(value: Any) -> str:
    """As repr writes it, but for strings, which get double quotes as the rest of the program's."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, ExpertSource):
        given = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"ExpertSource({', '.join(_keywords({k: v for k, v in given.items() if v is not None}))})"
    return repr(value)


def _call(function: str, arguments: Sequence[str]) -> str:
    """On one line, or a line an argument."""
    line = f"{function}({', '.join(arguments)})"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"{function}(", *(f"    {each}," for each in arguments), ")"])
