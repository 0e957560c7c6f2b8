"""A picture of an example workflow in a running ComfyUI that has this repository among its custom nodes.

    python -m bench.comfyui_picture http://127.0.0.1:8188 docs/images/comfyui.webp

Needs selenium, chromium and chromium-driver. No model is needed: nothing is run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from bench.browser import chromium, photograph, until

EXAMPLES = Path(__file__).parents[1] / "example_workflows"
WIDTH, HEIGHT, SCALE = 1480, 800, 1.0
READY = """
return Object.keys(window.LiteGraph?.registered_node_types ?? {}).some(name => name.startsWith("MoE"));
"""
CLOSE = "document.querySelectorAll('.p-dialog button').forEach(button => button.click())"
"""The templates, which it shows whoever comes for the first time."""
OPEN = """
window.app.extensionManager.setting.set("Comfy.Minimap.Visible", false);
window.app.loadGraphData(arguments[0], true, true, arguments[1]);
"""
FIT = """
const nodes = window.app.graph.nodes ?? window.app.graph._nodes, {ds} = window.app.canvas;
const left = Math.min(...nodes.map(node => node.pos[0]));
const top = Math.min(...nodes.map(node => node.pos[1])) - 50;
const right = Math.max(...nodes.map(node => node.pos[0] + node.size[0]));
const bottom = Math.max(...nodes.map(node => node.pos[1] + node.size[1]));
ds.scale = Math.min((innerWidth - 110) / (right - left), (innerHeight - 100) / (bottom - top));
ds.offset[0] = 90 / ds.scale - left;
ds.offset[1] = 70 / ds.scale - top;
window.app.canvas.setDirty(true, true);
"""
"""The whole graph, between the page's bars."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("address", help="of ComfyUI")
    parser.add_argument("out", type=Path, help="WebP file")
    parser.add_argument("--workflow", default="Sol to Lune", help="by name, of example_workflows/")
    options = parser.parse_args()
    workflow = json.loads((EXAMPLES / f"{options.workflow}.json").read_text(encoding="utf-8"))
    with chromium(WIDTH, HEIGHT, SCALE) as browser:
        browser.get(options.address)
        until(lambda: browser.execute_script(READY), "nodes of moe-sampler")
        for script, arguments in ((OPEN, (workflow, options.workflow)), (CLOSE, ()), (FIT, ())):
            time.sleep(3)  # the page draws as it likes
            browser.execute_script(script, *arguments)
        time.sleep(2)
        photograph(browser, options.out)


if __name__ == "__main__":
    main()
