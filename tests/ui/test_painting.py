"""Runs in steps: watched, stopped, told again as a command and as a program."""

from __future__ import annotations

import dataclasses
import re
import shlex
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from moe_sampler.cli import app
from moe_sampler.cli.models import Model
from moe_sampler.cli.options import EncoderOptions, PipelineOptions
from moe_sampler.tinyflux import TinyFlux, TinyFluxConfig
from moe_sampler.ui.again import command_line, python_code
from moe_sampler.ui.form import STUDENT, Wrong
from moe_sampler.ui.painting import Painter, Picture, Preview, Said
from moe_sampler.ui.planning import Cast
from moe_sampler.ui.telling import Stop, told
from moe_sampler.viewing.images import read_settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def painter(tmp_path_factory) -> Painter:
    folder = tmp_path_factory.mktemp("student")
    TinyFlux(TinyFluxConfig.demo(num_double_layers=1, num_single_layers=1)).save_pretrained(folder)
    return Painter(Cast(PipelineOptions(device="cpu"), str(folder)))


def asked(painter: Painter, **values):
    first = painter.cast.form.first | {"prompt": "a castle with two towers, at dusk", "steps": 3}
    return painter.cast.settings(first | values)


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def again(painter: Painter, picture: Picture) -> tuple[str, str]:
    """As a command and as a program."""
    cast, settings = painter.cast, picture.settings
    encoders = cast.student_encoders("sol_weight" in settings) if "student" in settings else {}
    return (
        command_line(settings, cast.where, {}),
        python_code(settings, cast.model, cast.where, encoders),
    )


def assert_same_settings(name: str, picture: Picture) -> None:
    """As the command writes them, so that `--like` reads what the page has kept."""
    written, kept = read_settings(name), dict(picture.settings)
    assert {key: written[key] for key in kept} == kept
    assert written.keys() - kept.keys() <= {"image_sha256"}


def assert_made_again(painter: Painter, picture: Picture, name: str) -> None:
    """By the command, but for a grey level: a convolution may round differently elsewhere in memory."""
    line, program = again(painter, picture)
    compile(program, "program", "exec")
    assert max(map(len, line.splitlines())) < 100 or "student" in picture.settings
    result = CliRunner().invoke(app, shlex.split(line.replace("\\\n", " "))[1:])
    assert result.exit_code == 0, result.output
    assert_same_settings(name, picture)
    assert np.abs(pixels(Image.open(name)) - pixels(picture.image)).max() <= 1
    Path(name).unlink()


def assert_programmed(painter: Painter, picture: Picture, name: str) -> None:
    """Likewise by the program, whose picture has the model's own size."""
    _, program = again(painter, picture)
    exec(compile(program, "program", "exec"), {"__name__": "program"})
    made = Image.open(name)
    factor = picture.settings.get("zoom", 1)
    made = made.resize((made.width * factor, made.height * factor), Image.Resampling.BICUBIC)
    assert np.abs(pixels(made) - pixels(picture.image)).max() <= 1


def test_a_picture_is_watched_and_made_again(painter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, plan = asked(
        painter, seed=5, handoff_1=0.8, solver_sol="ddim", negative="night", guidance_lune=3.5
    )
    *before, picture = painter.picture(settings, plan, Stop())
    previews = [found for found in before if isinstance(found, Preview)]
    assert previews[0].step == 0 and previews[0].label == "1. Sol\nnoise 0.99, guidance 2.5"
    assert len(previews) < len(plan) and all(p.image.size == (64, 64) for p in previews)
    assert [type(found) for found in before if not isinstance(found, Preview)] in ([Said], [])
    assert picture.seen == tuple(previews) and picture.image.size == (512, 512)
    assert_made_again(painter, picture, "picture.png")
    assert_programmed(painter, picture, "picture.png")


def test_from_a_picture_with_one_expert_alone(painter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 64), "teal").save("start.png")
    values = {"maker": "lune", "steps": 2, "image": str(tmp_path / "start.png"), "strength": 0.5}
    settings, plan = asked(painter, **values)
    *_, picture = painter.picture(settings, plan, Stop())
    assert len(plan) == 1 and picture.image.width > picture.image.height
    assert_made_again(painter, picture, "picture.png")


def test_a_comparison(painter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, _ = asked(painter, steps_sol="1", steps_lune="1", handoff_1=0.8)
    *sheets, last = [f for f in painter.comparison(settings, Stop()) if isinstance(f, Picture)]
    assert len(sheets) == 3 and not any(sheet.settings for sheet in sheets)
    assert last.settings["num_inference_steps"] == 2
    assert_made_again(painter, last, "compare.png")
    assert painter.cast.form.values(last.settings)["prompt"] == settings["prompt"]
    painter.comparison(settings | {"reuse": 1}, Stop()).close()
    with pytest.raises(Wrong, match="full passes") as caught:
        painter.comparison(settings | {"reuse": 2}, Stop())
    assert caught.value.field == "reuse"
    with pytest.raises(Wrong, match="a spacing by its name") as caught:
        painter.comparison(settings | {"levels": {"lune": [0.7, 0.2]}}, Stop())
    assert caught.value.field == "levels_lune"


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_student(painter, tmp_path, monkeypatch, weight):
    monkeypatch.chdir(tmp_path)
    settings, plan = asked(painter, maker=STUDENT, weight_sol=weight, steps=2)
    *_, picture = painter.picture(settings, plan, Stop())
    assert set(plan.experts) == ({STUDENT, "sol"} if weight else {STUDENT})
    made_again = assert_made_again if weight else assert_programmed
    made_again(painter, picture, "picture.png")


def test_who_stops_gets_no_picture_and_soon(painter):
    settings, plan = asked(painter, steps=300)
    stop, seen = Stop(), []
    for found in painter.picture(settings, plan, stop):
        seen.append(found)
        if isinstance(found, Preview):
            stop.set()
    assert not any(isinstance(found, Picture) for found in seen)
    assert sum(isinstance(found, Preview) for found in seen) < 10
    settings, plan = asked(painter)
    *_, picture = painter.picture(settings, plan, Stop())  # and the next one comes
    assert isinstance(picture, Picture)


def test_what_is_wrong_shows_before_the_models(tmp_path):
    fresh = Painter(Cast())
    (tmp_path / "start.png").write_text("no picture")
    for field, values in {
        "height": {"height": "65"},
        "image": {"image": str(tmp_path / "start.png")},
    }.items():
        settings, plan = asked(fresh, **values)
        with pytest.raises(Wrong) as caught:
            fresh.picture(settings, plan, Stop())
        assert caught.value.field == field and fresh._loaded is None


def test_a_run_that_fails_tells_who_listens():
    def work(tell):
        tell(1)
        raise ValueError("no")

    heard = told(work, Stop())
    assert next(heard) == 1
    with pytest.raises(ValueError, match="no"):
        next(heard)


def test_a_run_that_nobody_hears_is_stopped():
    stop, ended = Stop(), threading.Event()

    def work(tell):
        tell(1)
        assert stop.wait(10)
        ended.set()

    heard = told(work, stop)
    next(heard)
    heard.close()
    assert ended.wait(10)


def test_where_the_page_was_started_with_other_models():
    """Their options come back, and a prompt that looks like one stays a prompt."""
    where = PipelineOptions(
        preset="sd15",
        sol="my sol.pt",
        revision=["v1"],
        subfolder=["experts"],
        lora=["lune=style.safetensors@0.8"],
        lora_text_encoder=False,
        device="cpu",
        local_files_only=True,
        speed="fast",
    )
    settings = {
        **{"prompt": "-o x", "seed": 1, "num_inference_steps": {"sol": 4, "lune": 8}, "handoff": [0.8, 0.5]},
        **{"guidance_scale": {"sol": 5.0}, "dtype": "bfloat16", "speed": "max"},
        "loras": [["lune", "style.safetensors", 0.8]],
        "lora_text_encoder": False,
    }
    typed = shlex.split(command_line(settings, where, {}).replace("\\\n", " "))
    assert typed[:2] == ["moe-sampler", "generate"] and typed[-2:] == ["--", "-o x"]
    assert " ".join(typed[2:-2]) == (
        "--seed 1 --steps sol=4 --steps lune=8 --guidance sol=5.0 --handoff 0.8 --handoff 0.5 --speed max "
        "--preset sd15 --sol my sol.pt --revision v1 --subfolder experts --local-files-only "
        "--lora lune=style.safetensors@0.8 "
        "--no-lora-text-encoder --device cpu -o picture.png"
    )
    program = python_code(settings, Model.read(where, {}), where, {})
    compile(program, "program", "exec")
    for part in (
        'preset="sd15"',
        'revision="v1"',
        'subfolder="experts"',
        'experts={"sol": ExpertSource(weights="my sol.pt")}',
        'dtype="bfloat16"',
        'pipe.set_adapters(["lora_0"], [0.8], expert="lune")',
        "text_encoder=False",
    ):
        assert part in program


def test_the_students_command_has_its_encoders():
    settings = {"prompt": "a castle", "seed": 0, "student": "runs/my student", "num_inference_steps": 4}
    settings |= {"sol_weight": 0.5, "dtype": "bfloat16"}
    encoders = {k: v for k, v in vars(EncoderOptions(t5="t5-base", t5_length=64)).items() if v is not None}
    line = command_line(settings, dataclasses.replace(PipelineOptions(), offload="expert"), encoders)
    assert re.sub(r"\s*\\\n\s*", " ", line) == (
        "moe-sampler tinyflux sample 'a castle' --seed 0 --steps 4 --sol-weight 0.5 "
        "--student 'runs/my student' --t5 t5-base --t5-length 64 -o picture.png"
    )
    assert "dtype=torch.bfloat16" in python_code(settings, Cast().model, PipelineOptions(), encoders)
