"""Chromium without a window, for the pages' pictures. Needs selenium, chromium and chromium-driver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["chromium", "photograph", "resize"]


@contextmanager
def chromium(width: int, height: int, scale: float = 1.0) -> Iterator[Any]:
    """selenium's driver of a window of so many CSS pixels, each `scale` of the picture's."""
    from selenium import webdriver  # pyright: ignore[reportMissingImports]: for pictures alone

    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.add_argument(f"--force-device-scale-factor={scale}")
    options.binary_location = shutil.which("chromium") or ""
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        resize(browser, width, height, scale)
        yield browser
    finally:
        browser.quit()


def resize(browser: Any, width: int, height: int, scale: float) -> None:
    """Make what the page sees as large, without a window's frame."""
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def photograph(browser: Any, picture: Path) -> None:
    """What is seen, written as a WebP file."""
    shot = picture.with_suffix(".png")
    browser.save_screenshot(str(shot))
    with Image.open(shot) as image:
        image.convert("RGB").save(picture, quality=80, method=6)
    shot.unlink()
