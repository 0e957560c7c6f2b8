"""Routers: who works where, by noise level, by span, by step, by a function or a class of one's own."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from moe_sampler import Boundary, Crossfade, Expert, PerStep, Router, SamplingPlan, Spans, plan, sample
from moe_sampler.sampling.routers import active_experts, lead_spans

SOL, LUNE, SD15 = Expert.sol(), Expert.lune(), Expert.sd15()
FIVE = [Expert.lune(name=name) for name in "abcde"]


def names(compiled) -> list[str]:
    return ["+".join(call.name for call in step.calls) for step in compiled.steps]


def test_a_router_is_any_callable():
    def mine(noise: float) -> dict[str, float]:
        return {"sol": 1.0} if noise > 0.62 else {"lune": 1.0}

    assert plan((SOL, LUNE), mine, steps=9) == plan((SOL, LUNE), Boundary("sol", "lune", 0.62), steps=9)


def test_spans_are_found_to_the_last_bit():
    router = Spans((("sol", 0.705), ("lune", 0.7), ("sol", 0.123456789), ("lune", 0.0)))
    assert lead_spans(router, ["sol", "lune"]) == [
        ("sol", 1.0, 0.705),
        ("lune", 0.705, 0.7),
        ("sol", 0.7, 0.123456789),
        ("lune", 0.123456789, 0.0),
    ]


def test_crossfade_weights_are_smooth_and_add_up():
    router = Crossfade("sol", "lune", 0.8, 0.5)
    weights = [
        active_experts(router, s, ["sol", "lune"]).get("lune", 0.0)
        for s in torch.linspace(1, 0, 200).tolist()
    ]
    assert weights[0] == 0.0 and weights[-1] == 1.0
    assert all(0 <= later - earlier < 0.05 for earlier, later in itertools.pairwise(weights))
    # A smoothstep over ln(alpha / sigma), with the two experts in each other's places from its other end.
    start, end = math.log(0.2 / 0.8), math.log(0.5 / 0.5)
    for share, weight in ((0.25, 5 / 32), (0.5, 0.5), (0.75, 27 / 32)):
        noise = 1.0 / (1.0 + math.exp(start + share * (end - start)))
        assert router(noise) == pytest.approx({"sol": 1.0 - weight, "lune": weight})


@dataclasses.dataclass
class EveryOther:
    """A router of one's own: the noise axis in equal stripes."""

    first: str
    then: str
    stripes: int

    def __call__(self, noise: float) -> dict[str, float]:
        return {(self.first, self.then)[min(int((1 - noise) * self.stripes), self.stripes - 1) % 2]: 1.0}


def test_a_class_of_your_own(gentle_mixture):
    router: Router = EveryOther("sol", "lune", 4)
    assert [span[0] for span in lead_spans(router, ["sol", "lune"])] == ["sol", "lune"] * 2
    experts = [gentle_mixture.give_model(e) for e in (Expert.sol(solver="ddim"), LUNE)]
    compiled = plan(experts, router, steps={"sol": 16, "lune": 12})
    assert [name for name, _ in itertools.groupby(names(compiled))] == ["sol", "lune"] * 2
    # Whoever takes the turns, it is one path from noise to data.
    x = torch.linspace(-2, 2, 9)[None]
    turns = sample(compiled, experts, x)
    alone = sample(plan(experts[1], steps=28), experts[1], x)
    torch.testing.assert_close(turns, alone, atol=0.08, rtol=0)


def test_a_list_decides_step_by_step():
    half = {"sol": 0.5, "lune": 0.5}
    compiled = plan((SOL, LUNE), PerStep(["sol", "sol", half, "lune", {"lune": 1.0}]))
    assert names(compiled) == ["sol", "sol", "sol+lune", "lune", "lune"]
    assert [call.weight for call in compiled.steps[2].calls] == [0.5, 0.5]
    for step in compiled.steps[:3]:
        assert isinstance(step.calls[0].timestep, int)
    lune_alone = plan(LUNE, steps=5).noise_levels
    assert compiled.noise_levels[3:] == pytest.approx(lune_alone[3:], rel=1e-12)
    assert len(plan((SOL, LUNE), PerStep(["sol", "lune"] * 6))) == 12


def test_a_list_with_one_change_is_a_boundary_at_a_node_of_the_shared_grid():
    wide = dataclasses.replace(LUNE, shift=3.0)
    nodes = plan(wide, steps=12).noise_levels
    listed = plan((SOL, wide), PerStep(["sol"] * 4 + ["lune"] * 8), steps=12)
    assert listed == plan((SOL, wide), Boundary("sol", "lune", nodes[4]), steps={"sol": 4, "lune": 8})


@pytest.mark.parametrize("name", ["sol", "lune", "sd15"])
def test_a_list_of_one_expert_is_that_expert_alone(name):
    experts = {"sol": SOL, "lune": LUNE, "sd15": dataclasses.replace(SD15, spacing="leading")}
    assert plan(list(experts.values()), PerStep([name] * 9)) == plan(experts[name], steps=9)


def test_a_list_on_part_of_the_range_and_on_given_noise_levels():
    listed = PerStep(["sol", "lune", "lune"])
    part = plan((SOL, LUNE), listed, start=0.6, end=0.2)
    assert names(part) == ["sol", "lune", "lune"]
    assert part.start_level == SOL.path.level(SOL.path.nearest_timestep(0.6))
    assert part.steps[-1].target.noise == pytest.approx(0.2)
    given = plan((SOL, LUNE), listed, noise_levels=[0.9, 0.5, 0.25])
    assert names(given) == ["sol", "lune", "lune"] and given.noise_levels[1:] == (0.5, 0.25)
    with pytest.raises(ValueError, match="3 steps one by one, but there are 2"):
        plan((SOL, LUNE), listed, noise_levels=[0.9, 0.5])


@pytest.mark.parametrize("steps", [4, 2, {"sol": 1, "lune": 2}])
def test_a_list_brings_its_own_step_count(steps):
    with pytest.raises(ValueError, match="decides 3 steps one by one"):
        plan((SOL, LUNE), PerStep(["sol", "lune", "lune"]), steps=steps)


def test_errors_of_lists():
    for wrong in ([], "sol", [1], [None], [["sol", "lune"]]):
        with pytest.raises(ValueError, match="a router per step lists"):
            PerStep(wrong)
    for wrong, message in (
        (["sol", "luna"], "names 'luna'"),
        (["sol", {"sol": 0.7}], "add up to 1, got {'sol': 0.7} at step 1"),
        (["sol", {"sol": math.nan, "lune": 1.0}], "sol's weight at step 1 must be a finite number, got nan"),
        (["sol", {"sol": "half", "lune": 1.0}], "weight at step 1 must be a finite number, got 'half'"),
        ([dict.fromkeys("abcde", 0.2)], "at most 4 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            plan((SOL, LUNE, SD15, *FIVE), PerStep(wrong))


def test_errors_of_routers():
    with pytest.raises(ValueError, match="the router names 'luna'"):
        plan((SOL, LUNE), Boundary("sol", "luna", 0.5))
    for at in (0.0, 1.0, -0.2, 1.3):
        with pytest.raises(ValueError, match="strictly between 0"):
            Boundary("sol", "lune", at)
    with pytest.raises(ValueError, match="below"):
        Crossfade("sol", "lune", 0.4, 0.6)
    with pytest.raises(ValueError, match="add up to 1"):
        plan((SOL, LUNE), lambda s: {"sol": 0.7, "lune": 0.7})
    with pytest.raises(ValueError, match="at most 4 experts can be at work at once, got a, b, c, d, e at"):
        plan(FIVE, lambda s: dict.fromkeys("abcde", 0.2))
    with pytest.raises(ValueError, match="end at noise level 0"):
        Spans((("sol", 0.5),))
    with pytest.raises(ValueError, match="each ending below"):
        Spans((("sol", 0.5), ("lune", 0.6), ("sol", 0.0)))
    with pytest.raises(ValueError, match="mapping from expert names to weights, got 'sol' at noise level 1"):
        plan((SOL, LUNE), lambda s: "sol")
    with pytest.raises(TypeError, match="a router is a callable"):
        plan((SOL, LUNE), {"sol": 0.7, "lune": 0.3})


@pytest.mark.parametrize("total", [0.995, 1.005, 1.0 - 1e-5, 1.0 + 1e-5])
def test_weights_add_up_to_one_but_for_rounding(total):
    """Half a percent is not rounding: the image would be as much too bright or too dark."""
    for router in (
        lambda s: {"sol": 0.5, "lune": total - 0.5},
        PerStep([{"sol": 0.5, "lune": total - 0.5}] * 4),
    ):
        with pytest.raises(ValueError, match="add up to 1"):
            plan((SOL, LUNE), router, steps=4)
    thirds = {"sol": 1 / 3, "lune": 2 / 3 + 1e-9 * (total - 1)}
    assert len(plan((SOL, LUNE), lambda s: thirds, steps=4)) == 4


@pytest.mark.parametrize(
    "router",
    [
        Boundary("sol", "lune", 0.7),
        Boundary("sol", "lune", 0.0313),
        Crossfade("sol", "lune", start=0.8, end=0.55),
        Spans((("sol", 0.7), ("sd15", 0.41), ("sol", 0.2), ("lune", 0.0))),
    ],
    ids=lambda router: type(router).__name__,
)
@pytest.mark.parametrize("end", [0.0, 0.3, 0.6, 0.7])
@pytest.mark.parametrize("start", [1.0, 0.9, 0.72])
def test_knots_find_what_asking_everywhere_finds(router, start, end):
    known = ["sol", "sd15", "lune"]
    searched = lead_spans(lambda noise: router(noise), known, start, end)
    assert lead_spans(router, known, start, end) == searched


def test_a_router_with_knots_is_asked_little():
    asked = []

    class Counted:
        knots = (0.5,)

        def __call__(self, noise):
            asked.append(noise)
            return {"sol" if noise > 0.5 else "lune": 1.0}

    assert lead_spans(Counted(), ["sol", "lune"]) == [("sol", 1.0, 0.5), ("lune", 0.5, 0.0)]
    assert len(asked) < 100


def test_four_experts_at_one_level_are_one_that_is_their_mean(gentle_mixture):
    """Each on its own path, told its own time and guided by its own scale; equal data, so mixing is exact."""
    kinds = (Expert.sol, Expert.sd15, Expert.lune, lambda **own: Expert.lune(name="moon", **own))
    four = [gentle_mixture.give_model(kind(guidance_scale=1.0, solver="dpmpp_2m")) for kind in kinds]
    compiled = plan(
        four, PerStep([dict(zip(("sol", "sd15", "lune", "moon"), (0.4, 0.3, 0.2, 0.1), strict=True))] * 30)
    )
    assert [len(step.calls) for step in compiled.steps] == [4] * 30 and compiled.model_calls == 120
    assert SamplingPlan.from_json(compiled.to_json()) == compiled
    mixed = sample(compiled, four, shape=(2, 200), seeds=[1, 2])
    alone = sample(plan(four[0], noise_levels=compiled.noise_levels), four[0], shape=(2, 200), seeds=[1, 2])
    # sd15's grid is another one, so that it looks a little beside the level.
    torch.testing.assert_close(mixed, alone, rtol=0, atol=0.02)
