"""The folder that rows become pictures in: a data set as `datasets`' ImageFolder reads it.

A picture is finished when its file is there, whole, with its settings in its metadata: nothing else says so,
so that whatever is killed, and when, a rerun sees what there is. The list, metadata.jsonl, is made of that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import remove, sweep, write_text
from .._readers import parse_json, read_regular
from ..data.listing import METADATA
from ..data.reports import printable, some
from ..pipelines.choices import PICTURE_FORMATS
from ..viewing.images import read_settings, save_image, zoom
from ..viewing.parameters import parameters_text
from .batches import Picture, Unit, settings_text

__all__ = ["ERRORS", "KIND", "PictureFolder", "check_same", "write_errors"]

KIND = "file of prompts"
ERRORS = "errors.jsonl"
_MOST_BYTES = 2**31


class PictureFolder:
    """Pictures in one folder, and a list of them.

    Args:
        folder: claimed.
        pictures: all that it is to have.
    """

    def __init__(self, folder: Path, pictures: Sequence[Picture]) -> None:
        self.folder, self._pictures = folder, pictures

    def begin(self) -> None:
        """Delete what a killed process left half written. Nobody else may be writing."""
        sweep(self.folder, [*(f"*.{suffix}" for suffix in PICTURE_FORMATS), METADATA[0], ERRORS])

    def check(self) -> None:
        """What is there, against what is asked for.

        Raises:
            ValueError: one that was made with other settings, or that no row asks for.
        """
        present = self._present()
        wanted = {picture.name: picture for picture in self._pictures}
        if any(name.endswith(".tar") for name in os.listdir(self.folder)):
            raise ValueError(f"{printable(self.folder)} has shards: give --shard-size, or another folder")
        strange = sorted(present - wanted.keys())
        if strange:
            raise ValueError(
                f"{printable(self.folder)} has {some(strange)}, which no row asks for: give another "
                "--output-dir, or delete what isn't wanted"
            )
        listed = self._listed()
        for name in sorted(present):
            settings = wanted[name].settings
            if listed.get(name) != settings_text(settings):
                check_same(self.folder / name, read_settings(self.folder / name), wanted[name])

    def _present(self) -> set[str]:
        names = os.listdir(self.folder)
        return {n for n in names if not n.startswith(".") and n.rpartition(".")[2] in PICTURE_FORMATS}

    def _listed(self) -> dict[str, str]:
        """Settings by name, from the list of a run before: quicker than to open every picture."""
        path = self.folder / METADATA[0]
        if not path.is_file():
            return {}
        text = read_regular(path, ValueError, _MOST_BYTES)
        rows = [parse_json(line, path, ValueError) for line in text.split("\n") if line.strip()]
        return {row["file_name"]: row["settings"] for row in rows if {"file_name", "settings"} <= row.keys()}

    def is_done(self, unit: Unit) -> bool:
        """Whether nothing of it is left to do."""
        return all(map(self.is_finished, unit.pictures))

    def is_finished(self, picture: Picture) -> bool:
        """By now."""
        return (self.folder / picture.name).exists()

    def write(self, picture: Picture, image: Any) -> None:
        """Write a picture, unless it is there."""
        if not self.is_finished(picture):
            settings = picture.settings
            parameters = parameters_text(settings, picture.run.plan, image.size)
            save_image(zoom(image, settings["zoom"]), self.folder / picture.name, settings, parameters)

    def end(self, unit: Unit) -> None:
        """All of a unit was tried."""

    def close(self) -> int:
        """Write the list of the pictures that are there, in the order of their rows; how many they are."""
        present = self._present()
        lines = [json.dumps(p.line, ensure_ascii=False) for p in self._pictures if p.name in present]
        if lines:
            write_text(self.folder / METADATA[0], "".join(f"{line}\n" for line in lines))
        return len(lines)

    def tidy(self) -> None:
        """Nobody writes any more."""


def check_same(where: object, settings: Mapping[str, Any], picture: Picture) -> None:
    """Raise ValueError where a picture was made with other settings than are asked for now; it names them."""
    wanted = json.loads(settings_text(picture.settings))
    found = json.loads(settings_text(settings))
    changed = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if changed:
        first, others = changed[0], len(changed) - 1
        more = f", and {others} more" if others else ""
        raise ValueError(
            f"{printable(where)} was made with other settings than {picture.place} asks for: {first} was "
            f"{_shown(found.get(first))}, is {_shown(wanted.get(first))}{more}. Give another folder, or "
            "delete the picture, and it is made again"
        )


def write_errors(folder: Path, errors: Collection[Mapping[str, Any]]) -> Path | None:
    """The rows that failed, a line each in errors.jsonl; without any there is no such file."""
    path = folder / ERRORS
    if not errors:
        remove(path)
        return None
    write_text(path, "".join(f"{json.dumps(error, ensure_ascii=False)}\n" for error in errors))
    return path


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
