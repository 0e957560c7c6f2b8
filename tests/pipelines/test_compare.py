"""The comparison's columns are what their captions say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from moe_sampler import Boundary, Crossfade, Expert, Spans, plan, sample
from moe_sampler.cli import app
from moe_sampler.pipelines.compare import compare
from moe_sampler.sampling.naive import naive_plan
from moe_sampler.viewing.images import read_settings

pytestmark = pytest.mark.usefixtures("one_thread")

HANDOFF = Expert.sol().path.level(400).noise


@pytest.mark.parametrize("solvers", [("ddim", "euler"), ("dpmpp_2m", "dpmpp_2m"), ("heun", "heun")])
def test_the_naive_plan_is_two_runs_and_an_unconverted_latent(gentle_mixture, solvers):
    experts = [
        gentle_mixture.give_model(e) for e in (Expert.sol(solver=solvers[0]), Expert.lune(solver=solvers[1]))
    ]
    sol, lune = experts
    right = plan(experts, Boundary("sol", "lune", HANDOFF), steps={"sol": 6, "lune": 8}, start=0.9)
    wrong = naive_plan(experts, right)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    first = plan(sol, steps=6, start=0.9, end=HANDOFF)
    by_hand = sample(plan(lune, steps=8, start=0.4), lune, sample(first, sol, x))
    torch.testing.assert_close(sample(wrong, experts, x), by_hand, atol=1e-5, rtol=0)
    assert len(wrong.noise_levels) == len(right.noise_levels) == 14
    # It is wrong in the handoff alone: undoing that gives the hybrid.
    level = sol.path.level(400)
    undone = sample(first, sol, x) / (level.alpha + level.sigma)
    exact = sample(plan(lune, steps=8, start=HANDOFF), lune, undone)
    if solvers[0] == "ddim":
        torch.testing.assert_close(sample(right, experts, x), exact, atol=1e-5, rtol=0)
    assert (exact - by_hand).abs().mean() > 0.02


def test_fresh_noise_differs_from_step_to_step_across_the_naive_handoff(mixture):
    """One plan, so that a step's noise is a function of its index there, too."""
    experts = [mixture.give_model(e) for e in (Expert.sol(solver="ddpm"), Expert.lune(solver="dpmpp_2m_sde"))]
    wrong = naive_plan(experts, plan(experts, Boundary("sol", "lune", 0.6), steps=6))
    drawn = []

    def noise(step: int) -> torch.Tensor:
        drawn.append(step)
        return torch.zeros(1, 4)

    sample(wrong, experts, torch.zeros(1, 4), noise=noise)
    assert len(drawn) == len(set(drawn)) > 3


@pytest.mark.parametrize(
    "router",
    [
        Crossfade("sol", "lune", 0.8, 0.5),
        Spans((("lune", 0.7), ("sol", 0.0))),
        Spans((("sol", 0.8), ("lune", 0.4), ("sol", 0.0))),
        Spans((("lune", 0.0),)),
    ],
)
def test_plans_without_one_handoff_are_refused(router):
    experts = Expert.sol(), Expert.lune()
    with pytest.raises(ValueError, match="hand over once from sol to lune"):
        naive_plan(experts, plan(experts, router, steps=12))


def test_experts_without_a_conversion_are_refused():
    pair = Expert.sol(), Expert.sd15()
    with pytest.raises(ValueError, match=r"DDPM path and then one on a flow path.*sol, sd15"):
        naive_plan(pair, plan(pair, Boundary("sol", "sd15", 0.7), steps=4))


@torch.no_grad()
def test_columns_are_the_pipelines_images(demo_pipeline):
    settings = dict(guidance_scale={"sol": 1.5, "lune": 2.5}, solver={"sol": "ddim"})
    shared = dict(num_inference_steps=6, negative_prompt="night", batch_size=3)
    found = compare(demo_pipeline, ["a castle", "a portrait"], [3, 8], handoff=0.8, **shared, **settings)
    call = shared | settings | dict(prompt=["a castle"] * 2 + ["a portrait"] * 2, seed=[3, 8, 3, 8])
    for column, own in ((0, {"expert": "sol"}), (1, {"expert": "lune"}), (3, {"handoff": 0.8})):
        made = demo_pipeline(**call, **own)
        assert found.plans[column] == made.plan
        for mine, theirs in zip(found.images[column], made.images, strict=True):
            assert (np.asarray(mine) == np.asarray(theirs)).all()
    assert found.titles == ("Sol alone", "Lune alone", "Naive handoff", "Hybrid")
    assert found.rows == (
        '"a castle", seed 3',
        '"a castle", seed 8',
        '"a portrait", seed 3',
        '"a portrait", seed 8',
    )
    assert all(len(plan.noise_levels) == 6 for plan in found.plans)
    # The naive column by hand: pixels of two runs on the pipeline's own experts.
    experts = demo_pipeline.experts(**settings)
    compiled = demo_pipeline.plan(num_inference_steps=6, handoff=0.8, experts=experts)
    cond, uncond = ({"prompt_embeds": demo_pipeline.encode_texts(text)} for text in ("a castle", "night"))
    latents = sample(
        naive_plan(experts, compiled), experts, shape=(1, 4, 16, 16), seeds=[3], cond=cond, uncond=uncond
    )
    by_hand = np.asarray(demo_pipeline.decode_latents(latents)[0]).astype(int)
    # One grey level at most: the model may round differently in another batch.
    assert np.abs(by_hand - np.asarray(found.images[2][0])).max() <= 1
    assert np.abs(by_hand - np.asarray(found.images[3][0])).mean() > 3


@torch.no_grad()
def test_solvers_are_columns_of_as_many_calls(demo_pipeline):
    solvers = ["ddpm+euler", "heun", "dpmpp_2m@cosine", "ddim+dpmpp_3m@beta"]
    found = compare(demo_pipeline, "a castle", 3, 6, solvers=solvers)
    assert list(found.titles) == solvers
    assert [len(plan) for plan in found.plans] == [6, 5, 6, 6]  # each step of Heun's takes two, but the last
    assert [note.split("\n")[0] for note in found.notes] == ["6 model calls", "5 model calls"] + [
        "6 model calls"
    ] * 2
    call = dict(num_inference_steps=6, solver={"sol": "ddim", "lune": "dpmpp_3m"}, levels={"lune": "beta"})
    made = demo_pipeline("a castle", seed=3, **call)
    assert found.plans[3] == made.plan
    assert (np.asarray(found.images[3][0]) == np.asarray(made.images[0])).all()
    for wrong, message in (
        (dict(solvers=["ddpm+euler+heun"]), "3 solvers for 2 experts"),
        (dict(solvers=["ddpn"]), 'unknown solver "ddpn"'),
        (dict(solvers=["ddim@even"]), 'unknown spacing "even"'),
        (dict(solvers=["ddim"], solver="euler"), "leave out solver"),
        (dict(solvers=["ddim"], num_inference_steps=1), "1 steps cannot serve 2"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(demo_pipeline, "a castle", **wrong)


def test_a_comparison_with_offloaded_experts_is_the_same(demo_pipeline):
    from moe_sampler import HybridPipeline
    from moe_sampler.demo import experts_path

    pipe = HybridPipeline.from_pretrained(experts_path(), offload="expert")
    pipe.set_progress_bar_config(disable=True)
    mine, resident = (compare(p, "a castle", 1, 3) for p in (pipe, demo_pipeline))
    for ours, theirs in zip(mine.images, resident.images, strict=True):
        assert (np.asarray(ours[0]) == np.asarray(theirs[0])).all()


def test_the_sheet_shows_every_image_where_it_says(demo_pipeline):
    found = compare(demo_pipeline, ["a castle", "a portrait"], 0, 2)
    solid = tuple(tuple(Image.new("RGB", (64, 48), (60 * c, 100 * r, 7)) for r in range(2)) for c in range(4))
    sheet = np.asarray(dataclasses.replace(found, images=solid).sheet(tile=128))
    for column in range(4):
        for row in range(2):
            assert (sheet == (60 * column, 100 * row, 7)).all(-1).sum() >= 128 * 96
    with pytest.raises(TypeError, match="takes no router"):
        compare(demo_pipeline, "x", router=None)
    with pytest.raises(ValueError, match="one prompt and one seed"):
        compare(demo_pipeline, [], 0)


def test_the_command(tmp_path, monkeypatch, demo_pipeline):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
        assert result.exit_code == code, (result.output, result.exception)
        return result

    flags = ("--steps", 4, "--handoff", 0.8, "--guidance", "lune=3", "--seed", 2, "--seed", 5, "--tile", 64)
    assert run("a castle", "a portrait", *flags, "-o", "c.png").stdout.split() == ["c.png"]
    guidance = {"sol": 2.5, "lune": 3.0}
    found = compare(demo_pipeline, ["a castle", "a portrait"], [2, 5], 4, 0.8, guidance_scale=guidance)
    assert (np.asarray(Image.open("c.png")) == np.asarray(found.sheet(64))).all()
    settings = read_settings(tmp_path / "c.png")
    assert settings["prompts"] == ["a castle", "a portrait"] and settings["seeds"] == [2, 5]
    assert settings["guidance_scale"] == guidance and settings["handoff"] == 0.8
    generated = CliRunner().invoke(app, ["generate", "--like", "c.png", "-o", "d.png"])
    assert generated.exit_code == 2 and "give a prompt" in generated.stderr
    solvers = ("--solvers", "ddim+euler", "--solvers", "heun@beta")
    run("a castle", "--steps", 3, *solvers, "--tile", 64, "-o", "s.png")
    found = compare(demo_pipeline, "a castle", 0, 3, solvers=solvers[1::2])
    assert (np.asarray(Image.open("s.png")) == np.asarray(found.sheet(64))).all()
    assert read_settings(tmp_path / "s.png")["solvers"] == ["ddim+euler", "heun@beta"]
    assert "leave out --solver" in run("x", *solvers, "--levels", "beta", "-o", "e.png", code=2).stderr
    for wrong in (("--handoff", 1), ("--steps", 0), ("--steps", 1), ("--height", 60), ("--tile", 1)):
        assert run("x", *wrong, "-o", "e.png", code=2).stderr.startswith("error: ")
    assert not (tmp_path / "e.png").exists()
