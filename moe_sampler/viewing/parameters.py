"""An image's settings as AUTOMATIC1111's web UI writes them, which galleries, sites and other UIs read.

    a castle by a lake
    Negative prompt: rain
    Steps: 24, Sampler: DPM++ 2M, CFG scale: 2.5, Seed: 7, Size: 512x512, Version: moe-sampler 0.1.0

It has one sampler and one guidance scale. Where the experts differ, those are the first expert's, and the
others' stand after them under their own names. It is for reading alone: what makes an image again are our own
settings, which it stands beside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..sampling.plan import SamplingPlan

__all__ = ["parameters_text"]

_SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
}
"""By our names; others, which are diffusers', stay as they are."""


def parameters_text(settings: Mapping[str, Any], plan: SamplingPlan, size: tuple[int, int]) -> str:
    """The text that belongs under `parameters` into a PNG, and into the EXIF user comment of other formats.

    Args:
        settings: of the image, as `read_settings` gives them: prompt, negative prompt, seed, model.
        plan: that was run.
        size: (width, height) of the image as it was made.
    """
    negative = settings.get("negative_prompt")
    negatives = negative if isinstance(negative, Mapping) else dict.fromkeys(plan.experts, negative)
    negatives = {name: negatives.get(name) for name in plan.experts if negatives.get(name)}
    solvers: dict[str, str] = {}
    scales: dict[str, float] = {}
    counts = dict.fromkeys(plan.experts, 0)
    for step in plan.steps:
        solvers.setdefault(max(step.calls, key=lambda call: call.weight).name, step.solver)
        for call in step.calls:
            # Outside of a guidance window it is 1.
            scales[call.name] = max(scales.get(call.name, 1.0), call.guidance_scale)
        if not step.corrects:
            for call in step.calls:
                counts[call.name] += 1
    samplers = {name: _SAMPLERS.get(solver, solver) for name, solver in solvers.items()}
    fields: dict[str, Any] = {
        "Steps": len(plan.noise_levels),
        **_by_expert("Sampler", samplers),
        **_by_expert("CFG scale", {name: f"{scale:g}" for name, scale in scales.items()}),
        "Seed": settings.get("seed", 0),
        "Size": "{}x{}".format(*size),
    }
    model = settings.get("student") or settings.get("model") or settings.get("preset")
    if model:
        fields["Model"] = Path(model).name if Path(model).is_absolute() else model
    if settings.get("clip_skip"):
        fields["Clip skip"] = settings["clip_skip"] + 1  # counted from the last layer, which is 1
    if plan.from_image:
        fields["Denoising strength"] = settings.get("strength")
    if len(plan.experts) > 1:
        fields |= {f"{name} steps": count for name, count in counts.items()}
    fields |= (
        {f"{name} negative prompt": text for name, text in negatives.items()} if _differ(negatives) else {}
    )
    fields["Version"] = f"moe-sampler {settings['version']}" if "version" in settings else None
    told = ", ".join(f"{name}: {_value(value)}" for name, value in fields.items() if value is not None)
    lines = [str(settings.get("prompt", ""))]
    if negatives:
        lines.append(f"Negative prompt: {next(iter(negatives.values()))}")
    return "\n".join([*lines, told])


def _differ(values: Mapping[str, Any]) -> bool:
    return len(set(values.values())) > 1


def _by_expert(field: str, values: Mapping[str, str]) -> dict[str, str]:
    """The first expert's; the others' by name, where they are others."""
    first = next(iter(values.values()))
    own = {f"{name} {field}": value for name, value in values.items() if _differ(values)}
    return {field: first} | {name: value for name, value in own.items() if value != first}


def _value(value: Any) -> str:
    """Quoted where it would be read as more fields than one."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(char in text for char in ",:\n") else text
