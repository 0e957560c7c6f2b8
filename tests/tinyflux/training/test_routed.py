"""The routed experts' velocity, against exact denoisers and diffusers' schedulers."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from diffusers import DDPMScheduler

from moe_sampler import Expert
from moe_sampler.kernels import philox_normal
from moe_sampler.sampling.paths import FlowPath, VPPath
from moe_sampler.sampling.routers import Boundary, Crossfade
from moe_sampler.tinyflux.training.routed import RoutedTeachers

SOL, LUNE = Expert.sol(), Expert.lune()
TEXT = torch.zeros(1, 2, 3)


def exact(expert: Expert, mixture) -> Expert:
    """With its exact model, which finds each sample's level from the timestep it is told."""

    def model(x, timestep, prompt_embeds):
        levels = [expert.path.level(t) for t in timestep.tolist()]
        return torch.cat(
            [mixture.predict(expert.prediction, x[i : i + 1], level) for i, level in enumerate(levels)]
        )

    return dataclasses.replace(expert, model=model)


def true_velocity(mixture, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """E[x0 - ε | x] on the flow path, in float64."""
    s = noise.double().view(-1, 1, 1, 1)
    x0 = torch.cat([mixture.x0(x[i : i + 1], 1 - s[i].item(), s[i].item()) for i in range(len(x))])
    return (x0 - x.double()) / s


def levels_of_sol(timesteps) -> torch.Tensor:
    return torch.tensor([SOL.path.level(t).noise for t in timesteps])


def batch(count: int) -> dict:
    return {"prompt_embeds": TEXT.expand(count, -1, -1)}


@pytest.mark.parametrize(
    "router",
    [Boundary("sol", "lune", 0.5), Boundary("sol", "lune", 0.999), Crossfade("sol", "lune", 0.9, 0.1)],
    ids=["boundary", "lune alone", "crossfade"],
)
def test_on_sols_grid_the_velocity_is_exact_whoever_speaks(gentle_mixture, router):
    noise = levels_of_sol([5, 60, 180, 300, 420, 600, 750, 900, 999])
    x = philox_normal((len(noise), 2, 3, 4), range(len(noise)))
    teachers = RoutedTeachers([exact(SOL, gentle_mixture), exact(LUNE, gentle_mixture)], router)
    found = teachers.velocity(x, noise, batch(len(noise)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), true_velocity(gentle_mixture, x, noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_and_path(gentle_mixture, prediction):
    noise = torch.linspace(0.1, 0.9, 6)
    x = philox_normal((6, 2, 3, 4), range(6))
    teacher = exact(Expert("it", VPPath.scaled_linear(), prediction), gentle_mixture)
    found = RoutedTeachers([teacher], lambda noise: {"it": 1.0}).velocity(x, noise, batch(6))
    path = teacher.path
    grid = torch.tensor([path.level(path.nearest_timestep(s)).noise for s in noise.tolist()])
    torch.testing.assert_close(found.double(), true_velocity(gentle_mixture, x, grid), rtol=1e-4, atol=1e-4)
    # The grid's nearest level is all there is between it and the truth.
    assert (found - true_velocity(gentle_mixture, x, noise)).abs().max() < 0.02


@pytest.mark.parametrize("data_at_one", [False, True])
def test_a_student_can_teach_a_student(gentle_mixture, data_at_one):
    path = FlowPath(1.0 if data_at_one else 1000.0, data_at_one)
    teacher = exact(Expert("it", path, "reversed_flow_prediction"), gentle_mixture)
    noise, x = torch.tensor([0.2, 0.7]), philox_normal((2, 2, 3, 4), [1, 2])
    found = RoutedTeachers([teacher], lambda noise: {"it": 1.0}).velocity(x, noise, batch(2))
    torch.testing.assert_close(found.double(), true_velocity(gentle_mixture, x, noise), rtol=1e-4, atol=1e-4)


def test_nothing_grows_near_the_data(gentle_mixture):
    """Below Sol's cleanest timestep its velocity is that timestep's, not one over s of it."""
    noise, x = torch.tensor([1e-4, 1e-4]), philox_normal((2, 2, 3, 4), [1, 2])
    at_end = true_velocity(gentle_mixture, x, levels_of_sol([0, 0]))
    teachers = [exact(e, gentle_mixture) for e in (SOL, dataclasses.replace(SOL, prediction="epsilon"))]
    for teacher in teachers:
        found = RoutedTeachers([teacher], lambda noise: {"sol": 1.0}).velocity(x, noise, batch(2))
        torch.testing.assert_close(found.double(), at_end, rtol=1e-4, atol=1e-3)


class Talker:
    """Says how many samples it saw, and answers with their text."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, x, timestep, prompt_embeds):
        self.seen.append(len(x))
        return (prompt_embeds.mean((1, 2)).view(-1, 1, 1, 1).expand_as(x),)


def test_experts_see_their_own_samples_with_their_own_text():
    sol, lune = Talker(), Talker()
    experts = [dataclasses.replace(SOL, model=sol), dataclasses.replace(LUNE, model=lune)]
    text = torch.arange(6.0).view(6, 1, 1).expand(6, 2, 3)
    noise = torch.tensor([0.9, 0.1, 0.55, 0.2, 0.95, 0.45])
    x = torch.zeros(6, 1, 2, 2)
    found = RoutedTeachers(experts, Crossfade("sol", "lune", 0.6, 0.4)).velocity(
        x, noise, {"prompt_embeds": text}
    )
    assert (sol.seen, lune.seen) == ([4], [4])
    # Lune's output is noise - data.
    assert found[:, 0, 0, 0][[1, 3]].tolist() == [-1.0, -3.0]
    # (α + σ)·v of Sol's answers with x = 0.
    scales = [-(a + b) for a, b in ((p.alpha, p.sigma) for p in map(SOL.path.at, (0.9, 0.95)))]
    torch.testing.assert_close(
        found[:, 0, 0, 0][[0, 4]], torch.tensor([0.0, 4 * scales[1]]), rtol=5e-3, atol=0
    )


def test_guidance_leads_away_from_the_empty_prompt():
    asked = []

    def encode(prompts):
        asked.append(prompts)
        return torch.tensor([float(len(p)) for p in prompts]).view(-1, 1, 1).expand(-1, 2, 3) + 1

    talker = Talker()
    teachers = RoutedTeachers(
        [dataclasses.replace(LUNE, model=talker)],
        lambda noise: {"lune": 1.0},
        encode_prompt=encode,
        guidance_scale=3.0,
    )
    x, noise = torch.zeros(2, 1, 2, 2), torch.tensor([0.5, 0.2])
    captions = {"caption": ["ab", "abcd"]}
    for _ in range(2):
        found = teachers.velocity(x, noise, captions)
    assert found[:, 0, 0, 0].tolist() == [-(1 + 3 * 2.0), -(1 + 3 * 4.0)]
    assert talker.seen == [4, 4] and asked == [["ab", "abcd"], [""], ["ab", "abcd"]]


def test_a_pipelines_experts(demo_pipeline):
    noise, captions = torch.tensor([0.8, 0.2]), ["a castle by a lake", "a portrait"]
    x = philox_normal((2, 4, 16, 16), [1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        found = RoutedTeachers.from_pipeline(demo_pipeline, Boundary("sol", "lune", 0.5)).velocity(
            x, noise, {"caption": captions}
        )
    assert not found.requires_grad
    scheduler = DDPMScheduler(beta_schedule="linear", prediction_type="v_prediction", clip_sample=False)
    abar = scheduler.alphas_cumprod.double()
    timestep = int((((1 - abar) / abar).sqrt() - 0.8 / 0.2).abs().argmin())
    alpha, sigma = abar[timestep].sqrt().item(), (1 - abar[timestep]).sqrt().item()
    with torch.no_grad():
        text = demo_pipeline.encode_texts(captions)
        seen = x[:1] * (alpha + sigma)
        v = demo_pipeline.unet_sol(seen, torch.tensor(timestep), text[:1]).sample
        lune = demo_pipeline.unet_lune(x[1:], torch.tensor(200.0), text[1:]).sample
    scheduler.set_timesteps(1000)
    x0 = scheduler.step(v, timestep, seen, generator=torch.Generator()).pred_original_sample
    torch.testing.assert_close(found[:1], x0 - (seen - alpha * x0) / sigma, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1:], -lune, rtol=1e-4, atol=1e-4)


def test_what_makes_no_sense_is_refused(gentle_mixture):
    router, lune = (lambda noise: {"lune": 1.0}), exact(LUNE, gentle_mixture)
    for experts, message in (([], "different names"), ([lune, lune], "different names"), ([SOL], "model")):
        with pytest.raises(ValueError, match=message):
            RoutedTeachers(experts, router)
    with pytest.raises(ValueError, match="null_embeds"):
        RoutedTeachers([lune], router, guidance_scale=2.0)
    with pytest.raises(ValueError, match="sol"):
        RoutedTeachers([lune], lambda noise: {"sol": 1.0}).velocity(
            torch.zeros(1, 1, 2, 2), torch.tensor([0.5]), batch(1)
        )
    for bad in (0.0, 1.5):
        with pytest.raises(ValueError, match="shares of noise"):
            RoutedTeachers([lune], router).velocity(torch.zeros(1, 1, 2, 2), torch.tensor([bad]), batch(1))


def test_every_handoff_gives_the_same_with_exact_experts(gentle_mixture):
    noise = levels_of_sol([100, 350, 500, 800])
    x = philox_normal((4, 2, 3, 4), range(4))
    experts = [exact(SOL, gentle_mixture), exact(LUNE, gentle_mixture)]
    found = [
        RoutedTeachers(experts, Boundary("sol", "lune", at)).velocity(x, noise, batch(4))
        for at in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    for one, other in itertools.pairwise(found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
