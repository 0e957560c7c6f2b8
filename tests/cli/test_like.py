"""Settings out of an image are input from strangers; Ctrl-C keeps what is finished."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, seed
from hypothesis import settings as trying
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from moe_sampler.cli import app
from moe_sampler.cli.like import check_places, check_types
from moe_sampler.pipelines.hybrid import HybridPipeline
from moe_sampler.viewing.images import read_settings, save_png

WHOLE = {
    "prompt": "a castle",
    "seed": 3,
    "model": None,
    "handoff": 0.9,
    "num_inference_steps": {"sol": 2, "lune": 2},
    "guidance_scale": {"sol": 2.5, "lune": None},
    "guidance_window": [0.9, 0.1],
    "guider": {"lune": "apg eta 0.5 momentum -0.5"},
    "levels": {"sol": "karras", "lune": [0.7, 0.2]},
    "height": 64,
    "width": 64,
}


@seed(8)
@trying(max_examples=150, deadline=None, database=None)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.text())),
)
def test_settings_are_of_their_types_or_refused(name, value):
    try:
        check_types(WHOLE | {name: value}, Path("a.png"))
    except ValueError as error:
        assert f"a.png's settings are damaged: {name}" in str(error) and "\n" not in str(error)
    else:
        assert value is None or not isinstance(value, bool)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", None),
        ("prompt", ["a castle"]),
        ("negative_prompt", {"sol": ["fog"]}),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", "3"),
        ("zoom", 10**6),
        ("height", 10**9),
        ("num_inference_steps", 10**9),
        ("guidance_scale", {"sol": "2"}),
        ("guidance_scale", 10**400),
        ("handoff", float("nan")),
        ("loras", [["sol", "style.safetensors"]]),
        ("loras", "style"),
        ("sources", {"sol": {"weights": 3}}),
        ("sources", {"sol": {"weights": "a", "code": "b"}}),
        ("prompt", ["a castle"]),
        ("plan", "sol"),
        ("reuse", "3"),
        ("reuse", [[0.5, 0]]),
        ("budget", "12"),
    ],
)
def test_what_was_tampered_with_is_one_line_before_any_work(tmp_path, name, value, monkeypatch):
    monkeypatch.setattr(HybridPipeline, "from_pretrained", lambda *a, **k: pytest.fail("too late"))
    save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", WHOLE | {name: value})
    result = CliRunner().invoke(app, ["generate", "--like", str(tmp_path / "a.png"), "-o", "b.png"])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert f"settings are damaged: {name}" in result.stderr


@pytest.mark.parametrize(
    ("settings", "options", "asked"),
    [
        ({}, {}, None),
        ({"model": None}, {}, None),
        ({"model": "owner/repo"}, {}, "owner/repo"),
        ({"model": "owner/repo"}, {"model": "owner/repo"}, None),
        ({"model": "owner/repo"}, {"trust": True}, None),
        ({"sources": {"sol": {"weights": "a/b:c"}}}, {}, "a/b:c"),
        ({"sources": {"sol": {"weights": "a/b:c"}}}, {"sol": "mine"}, None),
        ({"sources": {"x": {"weights": "a/b:c"}}}, {"expert_source": ["x=mine"]}, None),
        ({"sources": {"x": {"weights": "a/b:c"}}}, {"preset": "sd15"}, None),
        ({"loras": [["sol", "/etc/style", 1.0]]}, {}, "/etc/style"),
        ({"loras": [["sol", "/etc/style", 1.0]]}, {"lora": ["sol=mine"]}, None),
        ({"image": "/dev/zero"}, {}, "/dev/zero"),
        ({"image": "/dev/zero"}, {"image": Path("mine.png")}, None),
        ({"vae": "a/b"}, {"model": "mine"}, "a/b"),
    ],
)
def test_places_that_only_the_image_names_need_trust(settings, options, asked):
    given = SimpleNamespace(**{name: value for name, value in options.items() if name != "trust"})
    out = SimpleNamespace(like=Path("a.png"), trust=options.get("trust", False))
    if asked is None:
        check_places(out, settings, given)
    else:
        with pytest.raises(ValueError, match=f"{asked}: give --trust"):
            check_places(out, settings, given)


FLAGS = ("--steps", "4", "-n", "3", "--batch-size", "1", "--zoom", "1", "--device", "cpu")


@pytest.mark.parametrize("more", [(), ("--trace",), ("--offload", "expert")])
def test_ctrl_c_keeps_the_images_of_finished_batches(tmp_path, monkeypatch, more):
    def generate(name: str, code: int):
        result = CliRunner().invoke(app, ["generate", "a castle", *FLAGS, *more, "-o", name])
        assert result.exit_code == code, result.output
        return result

    def interrupted(pipe, latents, *args, **kwargs):
        if latents.shape[0] == 1 and Path("a-1.png").exists():
            raise KeyboardInterrupt
        return decode(pipe, latents, *args, **kwargs)

    decode = HybridPipeline.decode_latents
    monkeypatch.chdir(tmp_path)
    generate("whole.png", 0)
    assert [read_settings(f"whole-{i}.png")["seed"] for i in (1, 2, 3)] == [0, 1, 2]
    monkeypatch.setattr(HybridPipeline, "decode_latents", interrupted)
    assert generate("a.png", 130).stderr.splitlines()[-1] == "interrupted"
    assert Path("a-1.png").read_bytes() == Path("whole-1.png").read_bytes()
    assert not Path("a-2.png").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "more",
    [
        *(("--seed", "-1"), ("--seed", str(2**63)), ("--guidance", "1000"), ("--guidance", "-3")),
        *(("--budget", "5"), ("--reuse", "0.95:1,0:2")),
    ],
    ids=" ".join,
)
def test_whatever_an_image_is_made_with_makes_it_again(tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["a castle", *FLAGS[:2], *FLAGS[6:], *more, "-o", "a.png"],
        ["--like", "a.png", "-o", "b.png"],
    ):
        result = CliRunner().invoke(app, ["generate", *arguments])
        assert result.exit_code == 0, result.output
    assert read_settings("a.png") == read_settings("b.png")
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("x" * 100_001, "100,001 characters, more than 100,000"), ("a \0 castle", "a prompt has a NUL")],
)
def test_a_prompt_that_no_image_could_be_made_with_again(tmp_path, monkeypatch, prompt, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["generate", prompt, "-o", "a.png"])
    assert result.exit_code == 2 and message in result.stderr
    assert not list(tmp_path.iterdir())
