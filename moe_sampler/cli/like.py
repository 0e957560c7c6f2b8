"""`--like`: an image's settings are input from strangers, checked before any of them is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import listed
from ..pipelines.choices import MAX_PROMPT
from .by_name import split_name
from .models import DEMO
from .options import OutputOptions

__all__ = ["check_places", "check_types", "read_like"]

_Check = Callable[[Any], bool]
_PLACES = ("model", "image", "student", "vae", "clip", "t5", "encoders")
_MOST = 10_000


def read_like(options: OutputOptions) -> dict[str, Any]:
    """The settings of the image that --like names, of the types they are written with; {} without one.

    Raises:
        ValueError: no image of ours, or one whose settings were tampered with.
    """
    if options.like is None:
        return {}
    from ..viewing.images import read_settings

    found = read_settings(options.like)
    check_types(found, options.like)
    return found


def check_types(settings: Mapping[str, Any], like: Path) -> None:
    """Raise ValueError at the first setting that has another type than it is written with, or is absurd."""
    for name, value in settings.items():
        if name in _CHECKS and not _CHECKS[name](value):  # nothing uses what isn't known
            shown = repr(value)
            raise ValueError(f"{like}'s settings are damaged: {name} is {shown[:60]}")


def check_places(options: OutputOptions, previous: Mapping[str, Any], *groups: Any) -> None:
    """Raise ValueError where files or hub repositories that only the image names would be read.

    groups: the options that may name them instead.
    """
    if options.like is None or options.trust:
        return
    said = {name: value for group in groups for name, value in vars(group).items() if value not in (None, [])}
    places = [previous[key] for key in _PLACES if key not in said and _names_files(key, previous.get(key))]
    sources = {} if said.keys() & {"model", "preset"} else previous.get("sources", {})
    if not sources and "preset" in said and previous.get("model") in places:
        places.remove(previous["model"])  # another preset replaces the model before
    named = {split_name("--expert-source", text)[0] for text in said.get("expert_source", ())} | said.keys()
    places += [source["weights"] for name, source in sources.items() if name not in named]
    if "lora" not in said:
        places += [path for _, path, _ in previous.get("loras", ())]
    if places:
        raise ValueError(
            f"{options.like} was made with {listed(places)}: give --trust to read what an image names, "
            "or name it yourself with the options"
        )


def _names_files(key: str, value: Any) -> bool:
    return isinstance(value, str) and (key, value) != ("student", DEMO)


def _number(low: float, high: float) -> _Check:
    return lambda value: (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value if abs(value) < 1e300 else math.inf)
        and low <= value <= high
    )


def _whole(low: int, high: int) -> _Check:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= MAX_PROMPT and "\0" not in value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _several(check: _Check, most: int = 1000) -> _Check:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def _either(*checks: _Check) -> _Check:
    return lambda value: any(check(value) for check in checks)


def _row(*checks: _Check) -> _Check:
    return lambda value: (
        isinstance(value, list)
        and len(value) == len(checks)
        and all(check(each) for check, each in zip(checks, value, strict=True))
    )


def _by_name(check: _Check) -> _Check:
    """One value for all experts, or a mapping by their names."""
    whole = _either(check, lambda value: value is None)
    return lambda value: (
        whole(value) or (isinstance(value, dict) and len(value) <= 100 and all(map(whole, value.values())))
    )


def _source(value: Any) -> bool:
    texts = ("weights", "subfolder", "revision", "variant", "training", "config")
    return (
        isinstance(value, dict)
        and isinstance(value.get("weights"), str)
        and all(
            key in texts and (each is None or _text(each) or (key in texts[4:] and isinstance(each, dict)))
            for key, each in value.items()
        )
    )


def _sources(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= 100 and all(map(_source, value.values()))


_level = _number(0, 1)
_any_number = _number(-1e6, 1e6)
_full_calls = _either(_whole(1, _MOST), _several(_whole(0, _MOST)), _several(_row(_level, _whole(1, _MOST))))
_weight = _either(_any_number, _several(_row(_level, _any_number)))
_CHECKS: dict[str, _Check] = {
    "prompt": lambda value: value is not None and _text(value),
    **dict.fromkeys(
        ("router", "expert", "model", "preset", "variant", "revision", "subfolder", "dtype"), _text
    ),
    **dict.fromkeys(("speed", "version"), _text),
    **dict.fromkeys(("image", "image_sha256", "student", "vae", "clip", "t5", "encoders"), _text),
    **dict.fromkeys(("lora_text_encoder", "upstream_schedule"), _flag),
    **dict.fromkeys(("shift", "eta", "guidance_scale", "guidance_rescale"), _by_name(_any_number)),
    **dict.fromkeys(("sol_weight", "lune_weight"), _weight),
    **dict.fromkeys(("height", "width"), _whole(1, 2**16)),
    "seed": _whole(-(2**63), 2**64 - 1),
    "zoom": _whole(1, 64),
    "t5_length": _whole(1, _MOST),
    "ema": _either(_flag, _text),
    "strength": _level,
    "handoff": _either(_level, _several(_level)),
    "num_inference_steps": _by_name(_whole(0, _MOST)),
    **dict.fromkeys(("solver", "guider"), _by_name(_text)),
    "levels": _by_name(_either(_text, _several(_level))),
    "negative_prompt": _by_name(_text),
    "guidance_window": _by_name(_row(_any_number, _any_number)),
    "reuse": _by_name(_full_calls),
    "budget": _number(0, 1e6),
    "sources": _sources,
    "loras": _several(_row(_text, _text, _any_number), 100),
    "plan": lambda value: isinstance(value, dict),
}
"""Everything that images are written with."""
