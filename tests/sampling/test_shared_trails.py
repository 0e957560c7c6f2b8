"""One scheduler across a change of expert: its memories go on where it is one method."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.scheduler_agreement import SEEDS, SHAPE, by_itself, difference, nonlinear
from moe_sampler import Boundary, Expert, SamplingPlan, Spans, plan, sample
from moe_sampler.sampling.scheduler_names import scheduler_of

METHODS = ("deis", "deis_3", "unipc", "unipc_3", "dpmpp_3m_sde", "sa_solver", "lms")
HANDOFF = 0.7


def saying_noise(expert: Expert) -> Expert:
    """The same model, which says the noise instead of v."""

    def model(x, timestep):
        level = expert.path.level(float(timestep))
        v = expert.model(x, timestep).double()  # pyright: ignore[reportOptionalCall]
        return (level.alpha * v + level.sigma * x.double()).to(x.dtype)

    return replace(expert, prediction="epsilon", model=model)


def pair(kind, solver: str) -> list[Expert]:
    """One model, twice; the second says noise where the path is DDPM's. The solvers are schedulers, which
    stop where diffusers' do."""
    early = nonlinear(kind(solver=solver))
    late = replace(early, name="late")
    experts = [early, saying_noise(late) if early.path.discrete else late]
    return [replace(expert, solver=scheduler_of(expert)) for expert in experts]


def everywhere(kinds, methods):
    return [
        pytest.param(kind, method, id=f"{kind.__name__}-{method}")
        for kind in kinds
        for method in methods
        if (kind, method) != (Expert.lune, "lms")
    ]


@pytest.mark.parametrize(("kind", "solver"), everywhere((Expert.sol, Expert.lune), METHODS))
def test_a_model_in_two_is_as_good_as_one(kind, solver):
    """Split at a handoff, it gives what the scheduler by itself gives, whatever each part predicts."""
    experts = pair(kind, solver)
    names = [expert.name for expert in experts]
    for steps in (8,) if solver in ("deis", "lms") else (8, 20):  # these two integrate numerically
        compiled = plan(experts, Boundary(names[0], names[1], HANDOFF), steps=steps)
        assert compiled.experts == tuple(names)
        expected = by_itself(scheduler_of(experts[0]), experts[0], steps)
        # diffusers has DEIS's coefficients of order 3, and a flow's 1 - sigma, in float32: four digits.
        most = 1e-4 if solver == "deis_3" or (solver == "deis" and kind == Expert.lune) else 1e-5
        assert difference(sample(compiled, experts, shape=SHAPE, seeds=SEEDS), expected) < most
        alone = plan(experts[0], steps=steps)
        assert (compiled.noise_levels, compiled.memories) == (alone.noise_levels, alone.memories)
        assert SamplingPlan.from_json(compiled.to_json()) == compiled


def test_three_experts_share_one_run():
    sol = Expert.sol(solver="unipc_3")
    three = [replace(sol, name=name) for name in "abc"]
    compiled = plan(three, Spans((("a", 0.8), ("b", 0.4), ("c", 0.0))), steps=12)
    rows = [[step.row for step in each.steps] for each in (plan(sol, steps=12), compiled)]
    assert compiled.experts == ("a", "b", "c") and rows[0] == rows[1]


def rows_of(compiled: SamplingPlan):
    return [step.update for step in compiled.steps]


def test_counts_by_name_are_kept_and_the_memories_go_on():
    """Each part then has the levels of its own count, as it had alone."""
    pairs = [Expert.sd15(solver="unipc", name="a"), Expert.sd15(solver="unipc", name="b")]
    compiled = plan(pairs, Boundary("a", "b", HANDOFF), steps={"a": 3, "b": 9})
    assert [step.calls[0].name for step in compiled.steps] == ["a"] * 3 + ["b"] * 9
    other = plan(
        [pairs[0], replace(pairs[1], solver="deis")], Boundary("a", "b", HANDOFF), steps={"a": 3, "b": 9}
    )
    assert compiled.noise_levels == pytest.approx(other.noise_levels)
    assert rows_of(compiled)[3].memories > 0 and rows_of(other)[3].memories == 0


@pytest.mark.parametrize("solver", ("unipc", "unipc_3", "deis", "dpmpp_3m_sde"))
def test_memories_go_on_from_a_path_to_another(solver):
    """What a method does depends on alpha / sigma alone, so that a flow's part is a DDPM path's, scaled."""
    experts = [Expert.sol(solver=solver), Expert.lune(solver=solver)]
    compiled = plan(experts, Boundary("sol", "lune", HANDOFF), steps={"sol": 6, "lune": 8})
    first = next(i for i, step in enumerate(compiled.steps) if step.calls[0].name == "lune")
    step = compiled.steps[first]
    assert step.update.memories > 0 and step.level.alpha + step.level.sigma == pytest.approx(1.0)
    assert compiled.steps[first - 1].target == step.level
    # A model that always says the same x0 is followed to the letter, whatever the path.
    at, state, memories = 0.3, compiled.steps[0].level.alpha * 0.3, [0.0, 0.0, 0.0]
    for each in compiled.steps:
        row = each.update
        assert state == pytest.approx(each.level.alpha * at, abs=1e-6)
        past = row.d_0 * memories[0] + row.d_1 * memories[1] + row.d_2 * memories[2]
        kept = row.keep_x * state + row.keep_x0 * at
        state = row.a * state + row.b * at + past
        memories = [kept, *memories][:3] if row.keeps else memories
    assert state == pytest.approx(at, abs=1e-6)


def test_what_isnt_one_method_starts_afresh():
    for solvers in (("unipc", "unipc_3"), ("deis", "unipc"), ("heun_karras", "heun_karras")):
        experts = [Expert.sd15(name=name, solver=solver) for name, solver in zip("ab", solvers, strict=True)]
        compiled = plan(experts, Boundary("a", "b", HANDOFF), steps={"a": 4, "b": 5})
        first = next(step for step in compiled.steps if step.calls[0].name == "b")
        assert first.update.memories == 0
