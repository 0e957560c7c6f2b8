"""Pictures made of many pictures: the layout of every sheet of this package, and how its labels are set."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Sheet", "contact_sheet", "fitted", "scalable_font", "wrapped"]

BACKGROUND = (250, 250, 248)
INK, FAINT = (38, 38, 40), (120, 120, 124)


def scalable_font(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font, at a size in pixels.

    Raises:
        RuntimeError: a Pillow without FreeType, which has a single small font.
    """
    found = ImageFont.load_default(size=size)
    if not isinstance(found, ImageFont.FreeTypeFont):
        raise RuntimeError("labels need a Pillow with FreeType: pip install --force-reinstall pillow")
    return found


def fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut with dots if it is wider than `width`."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def wrapped(text: str, characters: int, lines: int | None = None) -> str:
    """The text in lines of so many characters, and no more lines than that."""
    return "\n".join(textwrap.wrap(text, characters, max_lines=lines))


class Sheet:
    """Tiles of one size in a grid, with room for labels around it, above each row and below it.

    Args:
        columns, rows: of the grid.
        tile: (width, height) of a tile.
        gap: between two tiles.
        margins: (left, top, right, bottom), what the sheet is larger than the grid.
        above, below: room over and under the tiles of each row.

    Attributes:
        image: the sheet.
        draw: for its labels.
    """

    def __init__(
        self,
        columns: int,
        rows: int,
        tile: tuple[int, int],
        *,
        gap: int,
        margins: tuple[int, int, int, int],
        above: int = 0,
        below: int = 0,
        background: str | tuple[int, int, int] = BACKGROUND,
    ) -> None:
        left, top, right, bottom = margins
        self.tile, self._first = tile, (left, top + above)
        self._pitch = (tile[0] + gap, above + tile[1] + below + gap)
        size = (
            left + columns * self._pitch[0] - gap + right,
            top + rows * self._pitch[1] - gap + bottom,
        )
        self.image = Image.new("RGB", size, background)
        self.draw = ImageDraw.Draw(self.image)

    def corner(self, column: int, row: int) -> tuple[int, int]:
        """The upper left corner of a tile."""
        return self._first[0] + column * self._pitch[0], self._first[1] + row * self._pitch[1]

    def paste(self, picture: Image.Image, column: int, row: int, *, smooth: bool = True) -> None:
        """A picture in its tile; scaled smoothly, or with its pixels as they are."""
        kind = Image.Resampling.NEAREST
        if smooth:
            larger = picture.width < self.tile[0]
            kind = Image.Resampling.BICUBIC if larger else Image.Resampling.LANCZOS
        self.image.paste(picture.convert("RGB").resize(self.tile, kind), self.corner(column, row))

    def heading(self, column: int, y: int, text: str, font: ImageFont.FreeTypeFont) -> None:
        """A text in the middle of a column, its own middle at `y`."""
        x = self.corner(column, 0)[0] + self.tile[0] // 2
        self.draw.text((x, y), text, fill=INK, font=font, anchor="mm")


def contact_sheet(
    images: Sequence[Image.Image],
    labels: Sequence[str],
    columns: int,
    tile: int = 192,
    title: str | None = None,
) -> Image.Image:
    """Images in rows of `columns`, each scaled to `tile` pixels in width and labelled below."""
    if len(images) != len(labels) or not images:
        raise ValueError(f"as many labels as images, and at least one: got {len(labels)} and {len(images)}")
    font = scalable_font(max(11, tile // 14))
    line, gap = round(font.size * 1.35), 8
    height = round(tile * images[0].height / images[0].width)
    sheet = Sheet(
        min(columns, len(images)),
        -(-len(images) // columns),
        (tile, height),
        gap=gap,
        margins=(gap, gap + (2 * line if title else 0), gap, gap),
        below=line * max(label.count("\n") + 1 for label in labels) + 6,
    )
    if title:
        sheet.draw.text((gap, line // 2), title, fill=INK, font=font)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(index, columns)
        sheet.paste(image, column, row)
        x, y = sheet.corner(column, row)
        sheet.draw.multiline_text((x, y + height + 3), label, fill=INK, font=font, spacing=2)
    return sheet.image
