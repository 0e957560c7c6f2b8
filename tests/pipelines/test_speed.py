"""What `speed` does to a pipeline's models, and that it leaves the sampler alone."""

from __future__ import annotations

import copy
from functools import partialmethod

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import moe_sampler.architectures.unet_reuse
from moe_sampler import HybridPipeline
from moe_sampler.architectures.captured_model import CapturedModel
from moe_sampler.architectures.expert_model import ExpertModel
from moe_sampler.cli import app
from moe_sampler.demo import experts_path
from moe_sampler.pipelines import speed as speeds
from moe_sampler.pipelines.compare import compare
from moe_sampler.pipelines.speed import experts_read_channels_last, fast_dtype
from moe_sampler.viewing.images import encoded_image, read_settings

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = dict(seed=3, num_inference_steps=2, output_type="latent")


def load(**kwargs) -> HybridPipeline:
    pipe = HybridPipeline.from_pretrained(experts_path(), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def laid_out(model: torch.nn.Module) -> set[bool]:
    """Of all weights of convolutions that are more than a matrix: whether channels come last."""
    return {
        p.stride()[1] == 1 for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1
    }


@pytest.mark.parametrize(
    ("device", "capability", "silicon", "expected"),
    [
        ("cpu", None, True, torch.bfloat16),
        ("cpu", None, False, torch.float32),
        ("cuda:1", (9, 0), False, torch.bfloat16),
        ("cuda", (8, 0), False, torch.bfloat16),
        ("cuda", (7, 5), True, torch.float16),
        ("mps", None, True, torch.float32),
        (None, None, True, torch.bfloat16),
    ],
)
def test_the_number_format_a_device_is_fastest_in(monkeypatch, device, capability, silicon, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(speeds, "_cpu_has_bfloat16", lambda: silicon)
    assert fast_dtype(device) == expected


def test_auto_is_for_loading(monkeypatch):
    monkeypatch.setattr(speeds, "_cpu_has_bfloat16", lambda: True)
    pipe = load(dtype={"default": "auto", "vae": "float32"})
    assert (
        pipe.unet_sol.dtype == pipe.text_encoder.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    )
    with pytest.raises(ValueError, match="auto"):
        HybridPipeline.from_pipe(pipe, dtype="auto")


@pytest.mark.parametrize(
    ("device", "amx", "expected"), [("cpu", True, True), ("cpu", False, False), ("cuda", False, True)]
)
def test_where_unets_are_faster_with_channels_last(monkeypatch, device, amx, expected):
    monkeypatch.setattr(speeds, "_cpu_has", lambda what: what == "avx512_bf16" or amx)
    assert experts_read_channels_last(torch.device(device)) == expected
    if device == "cpu":
        pipe = load(speed="fast", dtype="float32")
        assert laid_out(pipe.unet_sol) == {expected} and laid_out(pipe.vae) == {True}


@pytest.fixture
def matrix_units(monkeypatch):
    monkeypatch.setattr(speeds, "_cpu_has", lambda what: what == "amx_tile")


@pytest.mark.usefixtures("matrix_units")
def test_fast_is_the_same_image_but_for_rounding(monkeypatch):
    plain = load()
    expected = plain("a castle", **QUICK).images
    fast = load(speed="fast", dtype="float32")
    assert fast.speed == "fast" and laid_out(fast.unet_lune) == laid_out(fast.vae) == {True}
    made = fast("a castle", **QUICK).images
    assert (made - expected).abs().max() < 1e-3
    fast.set_speed("none")
    assert laid_out(fast.unet_lune) == {False}
    assert torch.equal(fast("a castle", **QUICK).images, expected)

    monkeypatch.setattr(speeds, "_cpu_has_bfloat16", lambda: True)
    assert load(speed="fast").unet_sol.dtype == torch.bfloat16
    assert load(speed="fast", dtype="float16").unet_sol.dtype == torch.float16
    with pytest.raises(ValueError, match='unknown speed "faster": use none, fast or max'):
        load(speed="faster")


def test_fast_reuses_features_unless_a_call_says_otherwise(monkeypatch):
    fast, plain = load(speed="fast", dtype="float32"), load()
    given = QUICK | {"num_inference_steps": 10}
    made = fast("a castle", **given)
    assert made.plan == fast.plan(num_inference_steps=10) == plain("a castle", **given, reuse=3).plan
    assert torch.equal(made.images, fast("a castle", **given, reuse=3).images)
    assert not fast("a castle", **given, reuse=1).plan.reuses
    assert not fast("a castle", **given | {"num_inference_steps": 9}).plan.reuses
    assert not fast("a castle", **given, reuse={"sol": 1}).plan.reuses
    all_full = plain.plan(num_inference_steps=10, budget=20)
    assert fast.plan(num_inference_steps=10, budget=20) == all_full and not all_full.reuses
    sheet = compare(fast, "a castle", 3, num_inference_steps=10)
    assert not any(each.reuses for each in sheet.plans)

    def refuse(model):
        raise ValueError("can't be reused")

    monkeypatch.setattr(moe_sampler.architectures.unet_reuse, "check_reusable", refuse)
    assert fast.plan(num_inference_steps=10) == plain.plan(num_inference_steps=10)


@pytest.mark.usefixtures("matrix_units")
def test_the_layout_stays_when_experts_come_and_go():
    kept = load(speed="fast", dtype="float32")
    expected = kept("a castle", **QUICK, reuse=2).images
    pipe = load(speed="fast", dtype="float32", offload="expert")
    for _ in range(2):
        assert torch.equal(pipe("a castle", **QUICK, reuse=2).images, expected)
    pipe.set_offload("none")
    assert laid_out(pipe.unet_sol) == {True}


def test_max_compiles_every_repeated_block_for_its_sizes(monkeypatch):
    """The experts' and the decoder's; taken back, the same bits come out as before."""
    compiled = []
    compile_itself = torch.nn.Module.compile

    def eager(module, **kwargs):
        compiled.append((module, kwargs))
        compile_itself(module, backend="eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    images = QUICK | {"output_type": "pt"}
    pipe = load()
    plain = pipe("a castle", **images, reuse=2).images
    pipe.set_speed("max")
    models = [pipe.unet_sol, pipe.unet_lune, pipe.vae.decoder]
    names = ("BasicTransformerBlock", "AutoencoderTinyBlock")
    blocks = [m for model in models for m in model.modules() if type(m).__name__ in names]
    assert [module for module, _ in compiled] == blocks and {type(m).__name__ for m in blocks} == {*names}
    assert all(kwargs == {"dynamic": False} for _, kwargs in compiled)
    assert not any(m._compiled_call_impl for m in pipe.vae.encoder.modules())
    assert torch._dynamo.config.recompile_limit >= speeds.KINDS_OF_A_BLOCK
    pipe.set_speed("max")
    assert len(compiled) == len(blocks)
    made = pipe("a castle", **images, reuse=2).images  # features are reused beside compiled blocks
    assert (made - plain).abs().max() < 1e-3
    assert all(type(expert.model) is ExpertModel for expert in pipe.experts())  # there is no CUDA to record
    pipe.set_speed("none")
    assert not any(m._compiled_call_impl for m in blocks) and not pipe._cuda_graphs
    assert torch.equal(pipe("a castle", **images, reuse=2).images, plain)


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("speed", ["fast", "max"])
def test_a_pipeline_of_the_same_models_knows_how_fast_they_are(monkeypatch, speed):
    eager = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    pipe = load()
    plain = pipe("a castle", **QUICK).images
    pipe.set_speed(speed)
    new = copy.deepcopy(load().unet_lune)
    other = HybridPipeline.from_pipe(pipe, unet_lune=new)
    assert other.speed == speed and laid_out(new) == {True}
    assert bool(compiled_blocks(new)) == bool(compiled_blocks(pipe.unet_sol)) == (speed == "max")
    other.set_progress_bar_config(disable=True)
    other.set_speed("none")
    assert not compiled_blocks(new) and not compiled_blocks(pipe.unet_sol)
    assert torch.equal(other("a castle", **QUICK).images, plain)


def compiled_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if module._compiled_call_impl is not None]


def test_a_model_without_repeated_blocks_is_not_compiled():
    pipe = load()
    pipe.vae.decoder = torch.nn.Conv2d(4, 3, 1)
    with pytest.raises(ValueError, match=r'a Conv2d has no repeated blocks to compile: use speed="fast"'):
        pipe.set_speed("max")
    assert pipe.speed == "none" and not any(m._compiled_call_impl for m in pipe.unet_sol.modules())


def test_weights_that_only_come_to_the_device_for_a_while_are_not_recorded():
    pipe = load()
    pipe.unet_lune.enable_group_offload(torch.device("cuda"), offload_type="leaf_level")
    assert pipe.unet_lune.device.type == "cuda"  # so diffusers says
    pipe.enable_cuda_graphs()
    assert type(pipe._expert_model("lune")) is ExpertModel


@pytest.mark.gpu
def test_recorded_calls_make_the_same_image():
    pipe = load(device="cuda")
    expected = pipe("a castle", **QUICK, reuse=2).images
    pipe.enable_cuda_graphs()
    for seed in (3, 4, 3):
        made = pipe("a castle", **{**QUICK, "seed": seed}, reuse=2).images
    assert all(type(expert.model) is CapturedModel for expert in pipe.experts())
    assert (made - expected).abs().max() < 1e-4
    pipe.unet_lune.conv_in.weight.data = pipe.unet_lune.conv_in.weight * 1.5  # elsewhere, and another
    changed = pipe("a castle", **QUICK, reuse=2).images
    pipe.disable_cuda_graphs()
    assert all(type(expert.model) is ExpertModel for expert in pipe.experts())
    assert (changed - pipe("a castle", **QUICK, reuse=2).images).abs().max() < 1e-4
    assert (changed - expected).abs().max() > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m"])
def test_recorded_steps_make_the_same_image(solver):
    pipe = load(device="cuda")
    settings = {**QUICK, "num_inference_steps": 8, "solver": {"lune": solver}}
    expected = pipe("a castle", **settings).images
    pipe.enable_cuda_graphs()
    seen = []
    for told in ({}, {"callback_on_step_end": lambda pipe, step, t, tensors: seen.append(step) or {}}):
        assert (pipe("a castle", **settings, **told).images - expected).abs().max() < 1e-4
    assert seen == list(range(8))


@pytest.mark.gpu
def test_a_model_that_waits_says_that_it_cannot_be_recorded():
    pipe = load(device="cuda")
    pipe.enable_cuda_graphs()
    waits = pipe.unet_lune.conv_in.register_forward_hook(
        lambda module, args, output: output * output.sum().item()
    )
    with pytest.raises(ValueError, match="can't be recorded"):
        pipe("a castle", expert="lune", **QUICK)
    assert torch.randn(1, device="cuda").isfinite()  # which torch refuses after a recording that failed
    waits.remove()
    assert torch.isfinite(pipe("a castle", expert="lune", **QUICK).images).all()  # recorded after all
    pipe.disable_cuda_graphs()
    assert torch.isfinite(pipe("a castle", expert="sol", **QUICK).images).all()


def test_the_command_remembers_what_a_speed_let_reuse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def made(name, *options, told=False):
        result = CliRunner().invoke(app, ["generate", *options, "-o", name])
        assert result.exit_code == 0, result.output
        assert ("20 model calls per sample at the cost of 9.2: two of three" in result.output) == told
        return read_settings(name)

    def pixels(name):
        with Image.open(name) as image:
            return image.tobytes()

    fast = ("--speed", "fast", "--dtype", "float32")
    settings = made("a.png", "a castle", "--steps", "10", *fast, told=True)
    assert settings["reuse"] == {"lune": 3, "sol": 3}
    assert made("b.png", "--like", "a.png") == settings
    assert pixels("a.png") == pixels("b.png")
    budget = made("h.png", "a castle", "--steps", "10", *fast, "--reuse", "auto", "--budget", "12")
    assert budget == made("i.png", "a castle", "--steps", "10", *fast, "--budget", "12")
    assert "reuse" not in budget and pixels("h.png") == pixels("i.png") != pixels("a.png")
    full = made("c.png", "a castle", "--steps", "10", *fast, "--reuse", "1")
    assert full["reuse"] == 1 and made("d.png", "--like", "c.png") == full

    before = {key: value for key, value in full.items() if key != "reuse"}  # when no speed reused any
    with Image.open("c.png") as image:
        (tmp_path / "e.png").write_bytes(encoded_image(image, "e.png", before))
    assert made("f.png", "--like", "e.png")["reuse"] == 1
    assert pixels("f.png") == pixels("c.png") != pixels("a.png")
    assert made("g.png", "--like", "e.png", *fast, told=True)["reuse"] == {"lune": 3, "sol": 3}


def test_the_command_remembers_what_it_was_made_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speeds, "_cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in (["a castle", "--steps", "2", "--speed", "fast", "-o", "a.png"], ["--like", "a.png"]):
        result = CliRunner().invoke(app, ["generate", *options])
        assert result.exit_code == 0, result.output
    settings = read_settings("a.png")
    assert (settings["dtype"], settings["speed"]) == ("bfloat16", "fast")
    assert read_settings("image.png") == settings

    quick = ["--steps", "2", "-q"]
    for options in (["a castle", "-o", "b.png"], ["--like", "b.png", "--speed", "fast", "-o", "c.png"]):
        assert CliRunner().invoke(app, ["generate", *options, *quick]).exit_code == 0
    assert read_settings("b.png")["dtype"] == "float32"  # as it is by default, and no longer
    assert read_settings("c.png") == settings
