"""Chromium without a window, for the pages' pictures. Needs selenium, chromium and chromium-driver."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["chromium", "photograph", "resize", "until"]

PATIENCE = 180.0  # seconds: a busy machine imports for a minute


def until(found: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """What `found` gives as soon as it gives anything; an element that isn't there yet is nothing.

    Raises:
        AssertionError: it never did.
    """
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            if answer := found():
                return answer
        except Exception as error:  # selenium's, which need not be installed, are a dozen kinds
            if "selenium" not in type(error).__module__:
                raise
        time.sleep(0.1)
    raise AssertionError(f"waited in vain for {what}")


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
