"""What the cells of a row mean: every column is an option of `generate`, by its name or its setting's."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from .. import __version__
from .._numbers import whole
from ..data.captions import check_text
from ..data.reports import printable
from ..errors import listed
from ..pipelines.checks import check_strength
from ..pipelines.choices import MAX_IMAGES, MAX_PROMPT, PICTURE_FORMATS, any_of
from ..rows.batches import Picture, Run, settings_text
from ..rows.files import Row
from .asked import Asked, start_image
from .options import OutputOptions, PipelineOptions, RunOptions, SizeOptions

__all__ = ["RowReader"]

_PROMPTS = ("prompt", "text", "caption")
_ALSO = {"num_inference_steps": "steps", "guidance_scale": "guidance", "negative_prompt": "negative"}
"""What settings are called where options have another name."""
_OWN = ("image", "strength", "seed", "images", "zoom", "file_name")
_RUN = tuple(field.name for field in dataclasses.fields(RunOptions))
_SIZE = tuple(field.name for field in dataclasses.fields(SizeOptions))
_HINTS = get_type_hints(RunOptions) | get_type_hints(SizeOptions)
_OF_ALL = {field.name for group in (OutputOptions, PipelineOptions) for field in dataclasses.fields(group)}


class RowReader:
    """Rows to pictures.

    Args:
        asked: what the command's options ask for.
        settings: those of a row that says nothing.
        image: that rows start from, unless they say another.
        images: per row.
        columns: of the file.
        prompt_column: which has the prompts; by default the first of prompt, text and caption.
        keep: columns that are passed on.
        folder: of the file, which paths of images are relative to.
        image_format: ending of the pictures' names.
        dots: whether names may have dots of their own.

    Raises:
        ValueError: columns that mean nothing, or the same; none with prompts.
    """

    def __init__(
        self,
        asked: Asked,
        settings: Mapping[str, Any],
        *,
        image: Path | None,
        images: int,
        columns: Sequence[str],
        prompt_column: str | None,
        keep: Sequence[str],
        folder: Path,
        image_format: str,
        dots: bool,
    ) -> None:
        self._asked, self._settings = asked, dict(settings)
        self._keep, self._folder, self._suffix, self._dots = keep, folder, image_format, dots
        self._images = whole("images per prompt", images, MAX_IMAGES)
        self._prompt = _prompt_column(columns, prompt_column)
        self._columns = _known(columns, {self._prompt, *keep}, asked.plan is not None)
        absent = [name for name in keep if name not in columns]
        if absent:
            raise ValueError(f"--keep-column {absent[0]}: the columns are {listed(columns)}")
        given = image is not None or asked.previous.get("image") is not None
        self._start = _read_start(asked.previous, image) if given else (None, {})
        self._runs: dict[str, Run] = {}
        self._sizes: dict[tuple[Any, ...], dict[str, int]] = {}
        self._names: dict[str, Row] = {}
        self._seed = self._settings.pop("seed")

    def __call__(self, row: Row) -> list[Picture]:
        """The pictures that a row asks for. Rows are to come in order, as seeds count up.

        Raises:
            ValueError: what is wrong with it.
        """
        seed, self._seed = self._seed, self._seed + self._images
        if row.problem is not None:
            raise ValueError(row.problem)
        cells = {self._columns[name]: value for name, value in row.cells.items() if name in self._columns}
        images = _whole("images", cells.get("images", self._images), MAX_IMAGES)
        self._seed += images - self._images
        prompt = _prompt(row.cells.get(self._prompt), self._prompt)
        first = _whole("seed", cells.get("seed", seed), 2**64 - images, -(2**63))
        names = self._file_names(row, cells.get("file_name"), images)
        kept = {name: _plain(name, row.cells.get(name)) for name in self._keep}
        run, own = self._run(cells)
        pictures = [
            Picture(row.number, row.place, name, run, {"prompt": prompt, "seed": first + k} | own, kept)
            for k, name in enumerate(names)
        ]
        if self._suffix == "jpg" or any(name.endswith(".jpg") for name in names):
            from ..viewing.images import check_room

            check_room(Path(names[0]), pictures[0].settings)
        self._names |= dict.fromkeys(names, row)
        return pictures

    def _run(self, cells: Mapping[str, Any]) -> tuple[Run, dict[str, Any]]:
        """(What a row shares with all that have its settings, what else is its own)."""
        run = RunOptions(**{name: _option(name, cells[name]) for name in _RUN if name in cells})
        size = SizeOptions(**{name: _option(name, cells[name]) for name in _SIZE if name in cells})
        strength = _number("strength", cells["strength"]) if "strength" in cells else None
        if strength is not None and self._asked.plan is not None:
            raise ValueError("the plan decides which steps are run: leave out strength")
        settings = self._asked.settings(self._settings, run, size, strength)
        start, own = self._start_of(settings, cells.get("image"))
        negative = settings.pop("negative_prompt", None)
        if negative is not None:
            own |= {"negative_prompt": negative}
        settings["zoom"] = _whole("zoom", cells.get("zoom", self._settings.get("zoom", 1)), 64)
        shape = None if start is None else start.size
        key = settings_text({"settings": settings, "start": shape, "own": sorted(own)})
        if key not in self._runs:
            compiled = self._asked.compiled(settings, image=start is not None)
            sizes = self._size(settings, start)
            record = compiled.record | sizes | self._asked.of_all | {"version": __version__}
            call = {name: value for name, value in (compiled.call | sizes).items() if name != "seed"}
            self._runs[key] = Run(call, record, compiled.plan)
        return self._runs[key], own

    def _size(self, settings: Mapping[str, Any], start: Any) -> dict[str, int]:
        key = settings.get("height"), settings.get("width"), None if start is None else start.size
        if key not in self._sizes:
            self._sizes[key] = self._asked.model.size(settings, start)
        return self._sizes[key]

    def _start_of(self, settings: dict[str, Any], image: Any) -> tuple[Any, dict[str, Any]]:
        """(The PIL image to start from, what a picture remembers of it)."""
        if image is not None and not isinstance(image, str):
            raise ValueError(f"image must be a path, got {image!r}")
        found, own = self._start if image is None else _read_start({}, self._folder / image)
        strength = check_strength(settings.get("strength"), found, None)
        if strength is not None:
            settings["strength"] = strength
        return found, dict(own)

    def _file_names(self, row: Row, given: Any, images: int) -> list[str]:
        stem, suffix = f"{row.number:06d}", self._suffix
        if given is not None:
            stem, suffix = _file_name(given, self._suffix, self._dots)
        stems = [stem] if images == 1 else [f"{stem}-{k}" for k in range(1, images + 1)]
        names = [f"{each}.{suffix}" for each in stems]
        for name in names:
            if name in self._names:
                raise ValueError(f"its picture {name} is that of row {self._names[name].number}, too")
        return names


def _read_start(previous: Mapping[str, Any], image: Path | None) -> tuple[Any, dict[str, Any]]:
    noted: dict[str, Any] = {}
    found = start_image(noted, previous, image)
    return found, {name: noted[name] for name in ("image", "image_sha256")}


def _prompt_column(columns: Sequence[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"--prompt-column {wanted}: the columns are {listed(columns)}")
        return wanted
    found = [name for name in _PROMPTS if name in columns]
    if not found:
        raise ValueError(
            f"no column is called {any_of(_PROMPTS)}, only {listed(columns) or 'none'}: name that of the "
            "prompts by --prompt-column"
        )
    return found[0]


def _known(columns: Sequence[str], others: set[str], planned: bool) -> dict[str, str]:
    """Options by the columns that give them."""
    known = {name: name for name in (*_RUN, *_SIZE, *_OWN)} | _ALSO
    found: dict[str, str] = {}
    for column in columns:
        if column in others:
            continue
        if column not in known:
            raise ValueError(_unknown(column, list(known)))
        option = known[column]
        if option in found.values():
            raise ValueError(f"two columns give {option}: keep one of them")
        if planned and option in _RUN:
            raise ValueError(f"the plan decides {option}: leave out --plan or the column")
        found[column] = option
    return found


def _unknown(column: str, known: Sequence[str]) -> str:
    shown = printable(column)
    if column in _OF_ALL:
        return f'column "{shown}": that is of the whole run; give --{column.replace("_", "-")}'
    close = difflib.get_close_matches(column, known, 1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return (
        f'unknown column "{shown}"{meant}: columns are options of `generate`; --keep-column "{shown}" passes '
        "it on to the list of pictures"
    )


def _prompt(value: Any, column: str) -> str:
    if value is None:
        raise ValueError(f"it has no {column}")
    if not isinstance(value, str):
        raise ValueError(f"{column} must be a text, got {value!r}")
    if len(value) > MAX_PROMPT or "\0" in value:
        raise ValueError("its prompt is no text that an image can be described by: a NUL, or far too long")
    return check_text(value, "the prompt")


def _file_name(given: Any, suffix: str, dots: bool) -> tuple[str, str]:
    """(Stem, format) of a name that may come with its ending."""
    if not isinstance(given, str) or not given.isprintable() or given.startswith(".") or len(given) > 200:
        raise ValueError(f"file_name must be a name, got {given!r}")
    if "/" in given or "\\" in given:
        raise ValueError(f"file_name {given}: a name without folders, as all pictures are in one")
    stem, dot, ending = given.rpartition(".")
    if not dot or ending.lower() not in PICTURE_FORMATS:
        stem, ending = given, suffix
    if "." in stem and not dots:
        raise ValueError(f"file_name {given}: in shards a name ends at its first dot")
    return stem, ending.lower()


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return str(value)  # a date, a decimal


def _option(name: str, value: Any) -> Any:
    """A cell as the option of this name takes it."""
    reader = _READERS[str(_HINTS[name])]
    return reader(name, value)


def _whole(name: str, value: Any, most: int = 2**63, least: int = 1) -> int:
    """Also from a text, or a float that is whole: a column with gaps has no other numbers."""
    try:
        if isinstance(value, str) or (isinstance(value, float) and value.is_integer()):
            value = int(value)
    except ValueError:
        pass  # said below
    return whole(name, value, most, least)


def _number(name: str, value: Any) -> float:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise ValueError(f"{name} must be a number, got {value!r}")


def _numbers(name: str, value: Any) -> list[float]:
    parts = value.split(";") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [_number(name, part) for part in parts]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r}")
    return value


def _texts(name: str, value: Any) -> list[str]:
    """VALUE and NAME=VALUE, as an option that may be repeated takes them: in a text with semicolons between
    them, or an object by expert."""
    if isinstance(value, Mapping):
        return [f"{expert}={_typed(name, one)}" for expert, one in value.items() if one is not None]
    if isinstance(value, str) and name != "negative":
        return [part.strip() for part in value.split(";") if part.strip()]
    return [_typed(name, value)]


def _typed(name: str, value: Any) -> str:
    """As an option is written: 3; 0.9:0.3 of a window; 0,3,5 or 0.5:2,0:4 of full calls."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and name == "guidance_window":
        return ":".join(_typed(name, one) for one in value)
    if isinstance(value, list):
        pairs = [one if isinstance(one, list) else [one] for one in value]
        return ",".join(":".join(_typed(name, part) for part in pair) for pair in pairs)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(value)
    raise ValueError(f"{name} can't be {value!r}")


_READERS: dict[str, Callable[[str, Any], Any]] = {
    str(list[str] | None): _texts,
    str(list[float] | None): _numbers,
    str(str | None): _text,
    str(float | None): _number,
    str(int | None): _whole,
}
