"""The page as a person walks it, in a headless Chromium: type, generate, move the handoff, cancel, reload.

    pip install -c constraints.txt -e ".[test,ui]" selenium && apt-get install chromium chromium-driver

MOE_SAMPLER_SCREENSHOTS=FOLDER keeps what the page looks like on the way.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.browser import until

ROOT = Path(__file__).parents[2]
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))

needs_gradio = pytest.mark.skipif(not find_spec("gradio"), reason="needs Gradio: the extra ui")
needs_browser = pytest.mark.skipif(
    not (find_spec("selenium") and BROWSER and DRIVER), reason="needs selenium, chromium and chromedriver"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page in a process of its own, as a Space's `app.py` starts it, that asks nobody for anything."""
    home = tmp_path_factory.mktemp("page")
    environment = {**os.environ, "XDG_CACHE_HOME": str(home / ".cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    log = home / "log"
    with log.open("w") as file:
        page = subprocess.Popen(
            [sys.executable, str(ROOT / "space" / "app.py")],
            env=environment,
            stdout=file,
            stderr=file,
            cwd=home,
        )
    try:
        text = until(
            lambda: page.poll() is not None or "page is at" in log.read_text(encoding="utf-8"), "the page"
        )
        text = log.read_text(encoding="utf-8")
        assert page.poll() is None, text
        yield re.search(r"(http://127\.0\.0\.1:\d+/)", text)[1]
        assert "Traceback" not in log.read_text(encoding="utf-8")
    finally:
        page.send_signal(signal.SIGINT)
        assert page.wait(60) == 0


class Visitor:
    """A browser with the page open."""

    def __init__(self, address: str) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--window-size=1280,1100",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.get(address)
        until(lambda: self.source("#plan"), "the first plan")

    def one(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str):
        return self.driver.find_elements("css selector", selector)

    def source(self, where: str) -> str:
        return self.one(f"{where} img").get_attribute("src")

    def status(self) -> str:
        return self.one("#status").text

    def type(self, where: str, *keys: str) -> None:
        self.one(where).send_keys(*keys)

    def numbers(self, where: str, value: str) -> None:
        """Into the number beside a slider."""
        from selenium.webdriver.common.keys import Keys

        self.one(f"{where} input[type=number]").clear()
        self.type(f"{where} input[type=number]", value, Keys.TAB)

    def look(self, name: str) -> None:
        folder = os.environ.get("MOE_SAMPLER_SCREENSHOTS")
        if folder:
            self.driver.save_screenshot(f"{folder}/{name}.png")

    def hosts(self) -> set[str]:
        """Everyone the page has asked for anything."""
        sent = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = [e["params"]["request"]["url"] for e in sent if e["method"] == "Network.requestWillBeSent"]
        return {url.split("/")[2] for url in urls if url.startswith(("http", "ws"))}


@pytest.fixture
def visitor(address):
    visitor = Visitor(address)
    yield visitor
    visitor.driver.quit()


@needs_gradio
@needs_browser
def test_a_persons_path(visitor, address):
    from selenium.webdriver.common.keys import Keys

    page = visitor
    # Nothing typed: said beside the field.
    page.one("#generate").click()
    until(lambda: "what the picture shows" in page.one("#wrong_prompt").text, "what is wrong")
    # Type and press Enter: previews, then the picture, which is kept.
    page.numbers("#steps", "6")
    until(lambda: "6 steps" in page.one("#plan_words").text, "a plan of 6 steps")
    page.type("#prompt textarea", "a castle with two towers, at dusk", Keys.ENTER)
    seen = set()

    def painted() -> bool:
        seen.add(page.status())
        return "seed 0" in page.status()

    until(painted, "the picture")
    assert any(re.search(r"Step \d of 6, (Sol|Lune)", status) for status in seen), seen
    first, plan = page.source("#picture"), page.source("#plan")
    until(lambda: len(page.all("#gallery img")) == 1, "the gallery")
    page.look("picture")
    # The handoff, moved by keys: another plan, and another picture.
    page.type("#handoff_1 input[type=range]", *[Keys.ARROW_LEFT] * 30)
    until(lambda: page.source("#plan") != plan, "the plan to move")
    plan = page.source("#plan")
    page.type("#levels_lune input", Keys.CONTROL, "a", Keys.NULL, "karras", Keys.ENTER, Keys.TAB)
    until(lambda: page.source("#plan") != plan, "the levels to move")
    page.type("#prompt textarea", Keys.CONTROL + Keys.ENTER)
    until(lambda: len(page.all("#gallery img")) == 2, "the second picture")
    assert page.source("#picture") != first
    # Wrong input is said at once and only there; right again, it's gone.
    page.type("#steps_sol textarea, #steps_sol input", "x")
    until(lambda: "whole number" in page.one("#wrong_steps_sol").text, "what is wrong")
    assert not page.all("#wrong_seed p, #wrong_plan p")
    page.look("wrong")
    page.type("#steps_sol textarea, #steps_sol input", Keys.BACKSPACE)
    until(lambda: not page.all("#wrong_steps_sol p"), "nothing wrong")
    # What the demo was never told or shown is named below its field, and made all the same.
    page.one("#more button").click()
    until(lambda: page.all("#width textarea, #width input"), "the size")
    page.type("#width textarea, #width input", "96")
    until(lambda: page.all("#wrong_width p.note"), "the size's note, before anything is made")
    page.type("#negative textarea", "a wyvern")
    page.type("#prompt textarea", Keys.CONTROL, "a", Keys.NULL, "a castle with a dragon", Keys.ENTER)
    until(lambda: len(page.all("#gallery img")) == 3, "the third picture")
    for field, what in {"prompt": "dragon", "negative": "wyvern", "width": "96x64"}.items():
        assert what in page.one(f"#wrong_{field} p.note").text
    page.look("limits")
    # Cancel, by key: it stops, and nothing is kept.
    page.numbers("#steps", "100")
    until(lambda: "100 steps" in page.one("#plan_words").text, "a plan of 100 steps")
    page.one("#generate").click()
    until(lambda: "of 100" in page.status(), "steps")
    page.type("body", Keys.ESCAPE)
    until(lambda: "Stopped" in page.status(), "the end")
    time.sleep(1)
    assert "Stopped" in page.status() and len(page.all("#gallery img")) == 3
    # Loaded anew, it is as the last picture was made.
    page.driver.refresh()
    until(lambda: len(page.all("#gallery img")) == 3, "the gallery again")
    until(lambda: page.one("#steps input[type=number]").get_attribute("value") == "6", "the steps again")
    assert page.one("#prompt textarea").get_attribute("value") == "a castle with a dragon"
    assert page.one("#handoff_1 input[type=number]").get_attribute("value") == "0.6"
    assert page.one("#levels_lune input").get_attribute("value") == "karras"
    page.one("#again button").click()
    until(lambda: "--handoff 0.6" in page.one("#command").text.replace("\n", " "), "the command")
    assert "--levels lune=karras" in page.one("#command").text
    assert page.hosts() == {address.split("/")[2]}
    assert not [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]


@needs_gradio
@needs_browser
def test_visitors_take_turns(visitor, address):
    """Who waits is told so, and may give up; nobody sees another's pictures."""
    from selenium.webdriver.common.keys import Keys

    second = Visitor(address)
    try:
        visitor.numbers("#steps", "100")
        until(lambda: "100 steps" in visitor.one("#plan_words").text, "a plan of 100 steps")
        visitor.type("#prompt textarea", "a castle", Keys.ENTER)
        until(lambda: "of 100" in visitor.status(), "steps")
        second.type("#prompt textarea", "a portrait", Keys.ENTER)
        until(lambda: "queue: 1/1" in second.status(), "a place in the queue")
        second.one("#cancel").click()
        until(lambda: "Stopped" in second.status() and "queue" not in second.status(), "giving up")
        assert "of 100" in visitor.status()
        visitor.one("#cancel").click()
        until(lambda: "Stopped" in visitor.status(), "the end")
        second.numbers("#steps", "2")
        until(lambda: "2 steps" in second.one("#plan_words").text, "a plan of 2 steps")
        second.one("#generate").click()
        until(lambda: len(second.all("#gallery img")) == 1, "the second's picture")
        visitor.driver.refresh()
        until(lambda: visitor.source("#plan"), "the plan")
        assert not visitor.all("#gallery img")
    finally:
        second.driver.quit()


@needs_gradio
@needs_browser
def test_on_a_phone(visitor):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    visitor.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    until(lambda: visitor.driver.execute_script("return window.innerWidth") == 390, "a narrow page")
    width, picture, settings = visitor.driver.execute_script(
        "const top = (id) => document.getElementById(id).getBoundingClientRect().top;"
        "return [document.documentElement.scrollWidth, top('picture'), top('seed')]"
    )
    assert width == 390 and picture < settings  # the picture comes before the long form
    visitor.look("phone")


def test_without_gradio_it_says_what_to_install(monkeypatch):
    from typer.testing import CliRunner

    from moe_sampler.cli import app

    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["ui"])
    assert result.exit_code == 2
    assert result.stderr.strip() == "error: the page needs Gradio: pip install 'moe-sampler[ui]'"


def test_a_spaces_header():
    from huggingface_hub import RepoCard

    header = RepoCard.load(ROOT / "space" / "README.md").data
    assert header.sdk == "gradio" and (ROOT / "space" / header.app_file).is_file()
    assert header.license == "mit" and len(header.short_description) <= 60
    assert f"gradio=={header.sdk_version}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert (ROOT / "space" / "requirements.txt").read_text(encoding="utf-8").startswith("moe-sampler[ui]")
