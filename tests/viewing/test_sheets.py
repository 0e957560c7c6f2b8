"""Where a sheet puts its tiles and what fits beside them."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from moe_sampler.viewing.sheets import BACKGROUND, Sheet, contact_sheet, fitted, scalable_font, wrapped

RED, BLUE = (200, 0, 0), (0, 0, 200)


def test_tiles_lie_in_a_grid_inside_the_margins():
    sheet = Sheet(3, 2, (20, 10), gap=4, margins=(7, 5, 3, 2), above=6, below=8)
    assert sheet.image.size == (7 + 3 * 20 + 2 * 4 + 3, 5 + 2 * (6 + 10 + 8) + 4 + 2)
    assert sheet.corner(0, 0) == (7, 5 + 6)
    assert sheet.corner(2, 1) == (7 + 2 * 24, 5 + 6 + 28)
    for row in range(2):
        for column in range(3):
            sheet.paste(Image.new("RGB", (5, 5), RED if row else BLUE), column, row)
    pixels = np.asarray(sheet.image)
    assert (pixels == RED).all(-1).sum() == (pixels == BLUE).all(-1).sum() == 3 * 20 * 10
    assert (pixels[11:21, 7:27] == BLUE).all() and (pixels[39:49, 55:75] == RED).all()
    assert (pixels == BACKGROUND).all(-1).sum() == pixels[..., 0].size - 6 * 200


def test_pixels_stay_as_they_are_where_asked():
    checks = Image.fromarray(np.kron(np.eye(2), np.full((1, 1), 255)).astype(np.uint8))
    sheet = Sheet(2, 1, (8, 8), gap=0, margins=(0, 0, 0, 0))
    sheet.paste(checks, 0, 0, smooth=False)
    sheet.paste(checks, 1, 0)
    sharp, smooth = np.split(np.asarray(sheet.image)[..., 0], 2, axis=1)
    assert set(np.unique(sharp)) == {0, 255} and len(np.unique(smooth)) > 2


def test_labels_are_cut_to_fit():
    font = scalable_font(12)
    assert fitted("a castle", font, 500) == "a castle"
    cut = fitted("a castle with two towers, at dusk", font, 100)
    assert cut.endswith("...") and font.getlength(cut) <= 100
    assert wrapped("a castle with two towers", 10) == "a castle\nwith two\ntowers"
    assert wrapped("a castle with two towers", 10, lines=2).count("\n") == 1


def test_clear_errors(monkeypatch):
    with pytest.raises(ValueError, match="as many labels as images"):
        contact_sheet([Image.new("RGB", (8, 8))], [], 2)
    monkeypatch.setattr(ImageFont, "load_default", lambda size: object())
    with pytest.raises(RuntimeError, match="FreeType"):
        scalable_font(12)
