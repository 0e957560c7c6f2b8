"""A picture of `moe-sampler ui` after its first image.

    moe-sampler ui --port 7860 &
    python -m bench.page_picture http://127.0.0.1:7860 docs/images/ui.webp

Needs selenium, chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from bench.browser import chromium, photograph, until

WIDTH, HEIGHT, SCALE = 1280, 1037, 1.0
PROMPT, SEED = "a castle with two towers, at dusk", "10"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("address", help="of the page")
    parser.add_argument("out", type=Path, help="WebP file")
    options = parser.parse_args()
    with chromium(WIDTH, HEIGHT, SCALE) as browser:

        def one(selector: str) -> Any:
            return browser.find_element("css selector", selector)

        browser.get(options.address)
        until(lambda: one("#plan img"), "the plan")
        one("#seed input, #seed textarea").clear()
        one("#seed input, #seed textarea").send_keys(SEED)
        one("#prompt textarea").send_keys(PROMPT)
        one("#generate").click()
        until(lambda: f"seed {SEED}" in one("#status").text, "the picture")
        browser.execute_script("document.activeElement.blur()")
        time.sleep(2)  # the last of it fades in
        photograph(browser, options.out)


if __name__ == "__main__":
    main()
