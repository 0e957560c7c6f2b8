"""The benchmarks measure what they say: the same work by every provider, counted and timed in turns."""

import diffusers
import pytest
import torch

from bench import __main__ as command
from bench import counting, features, measure, noise, pages, plots, recipe, roofline, steps, suites, training
from bench.cases import cases
from bench.measure import OURS, Comparison, Result


def first(comparisons, **case):
    return next(c for c in comparisons if case.items() <= c.case.items())


@pytest.mark.parametrize("guidance", ["plain", "guided"])
@pytest.mark.parametrize("kind", ["VP, deterministic", "flow, Euler"])
def test_providers_of_a_step_agree(kind, guidance):
    comparison = first(steps.comparisons(), step=kind, guidance=guidance)
    names = {OURS, "diffusers DDIM", "recipe, DDIM"} if kind.startswith("VP") else {OURS, "recipe"}
    results = [comparison.providers[name]() for name in sorted(names)]
    values = [call()[:1].double() for call in results]
    for value in values[1:]:
        if kind.startswith("VP"):
            assert (value - values[0]).abs().max() < 1e-4 * values[0].abs().max()
        else:  # other sigmas, the same update: both move the state
            assert value.shape == values[0].shape


def test_the_recipe_asks_for_what_its_table_says():
    counts = {}
    for kind, provider in (("VP, ancestral", "recipe"), ("flow, Euler", "recipe"), ("VP, ancestral", OURS)):
        comparison = first(steps.comparisons(), step=kind, guidance="plain")
        counts[kind, provider] = counting.count_dispatches(comparison.providers[provider]())
    assert counts["VP, ancestral", OURS] == (1, 0)
    assert counts["flow, Euler", "recipe"] == (11, 0)
    dispatches, waits = counts["VP, ancestral", "recipe"]
    assert 60 <= dispatches <= 80 and 10 <= waits <= 16


@pytest.mark.parametrize("ancestral", [False, True])
def test_the_recipe_written_out_is_the_schedulers_step(ancestral):
    scheduler = (diffusers.DDPMScheduler if ancestral else diffusers.DDIMScheduler)(**steps._PLAIN)
    scheduler.set_timesteps(50)
    here, there = scheduler.timesteps[25:27]
    x, velocity = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    torch.manual_seed(0)
    expected = recipe.sol_step(x, velocity, here, scheduler)
    torch.manual_seed(0)
    bars = scheduler.alphas_cumprod[here], scheduler.alphas_cumprod[there]
    torch.testing.assert_close(recipe.sol_step_written_out(x, velocity, *bars, ancestral), expected)


def test_the_recipe_is_the_flow_step_and_guidance():
    x, velocity = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 4, 8, 8).double()
    half = torch.tensor(0.5, dtype=torch.float64)
    stepped = recipe.lune_step(x, velocity, half, half / 2, shift=3.0)
    torch.testing.assert_close(stepped, x - velocity * (0.75 - 0.5))
    guided = recipe.guide(torch.cat([x, velocity]), 3.0)
    torch.testing.assert_close(guided, x + 3.0 * (velocity - x))


TRAINING = list(training.comparisons())


@pytest.mark.parametrize("comparison", TRAINING, ids=[c.title for c in TRAINING])
def test_providers_of_a_training_operation_agree(comparison):
    if comparison.case["variant"] == "noise drawn":
        pytest.skip("the providers draw different noise")
    ours, eager = comparison.providers[OURS](), comparison.providers["eager"]()
    tolerance = 1e-5 if comparison.case["dtype"] == "float32" else 0.05
    for mine, theirs in zip(ours(), eager(), strict=True):
        mine, theirs = mine.double(), theirs.double()
        assert (mine - theirs).abs().max() < tolerance * theirs.abs().max()


def test_providers_of_the_statistics_agree():
    layers = features._layers([(1, 8, 16), (2, 4, 8)], torch.float32)
    for mine, theirs in zip(features._ours(layers), features._kept(layers), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_providers_take_turns():
    calls = []
    providers = {name: (lambda n=name: calls.append(n) or sum(range(20_000))) for name in "abc"}
    seconds = measure.interleave(providers, seconds=0.0, turns=(6, 6))
    assert {len(values) for values in seconds.values()} and all((v > 0).all() for v in seconds.values())
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    # Whoever ends a round may begin the next one, which then looks like one turn.
    assert {tuple(turns[i : i + 2]) for i in range(len(turns) - 1)} >= {("a", "b"), ("b", "c"), ("c", "a")}
    uncounted = len(calls) - sum(map(len, seconds.values()))
    assert uncounted >= 6 * 3, "every turn begins with a call that doesn't count"


def result(*microseconds, dispatches=1):
    return Result(torch.tensor(microseconds).double().numpy() * 1e-6, dispatches, 0, 2**20)


def rows():
    comparison = Comparison("toy", {"size": "1"}, {OURS: None, "other": None}, memory=True)
    return measure.table_rows(comparison, {OURS: result(10, 20, 30), "other": result(5, 10, 15)})


def test_a_row_says_who_won_and_on_what():
    ours, other = rows()
    assert (ours["median_us"], ours["times_ours"], ours["peak_MiB"]) == ("20.0", "1.00", "1.00")
    assert (other["median_us"], other["times_ours"], other["p20_us"]) == ("10.0", "0.50", "7.0")
    assert {"machine", "threads", "torch", "diffusers", "provider", "rounds"} <= other.keys()


def test_the_command_shows_what_was_lost_and_renews_its_page(tmp_path):
    page = "before\n<!-- measured: toy -->\nold\n<!-- end: toy -->\nafter"
    block = command._block(rows())
    assert "Slower than another provider in 1 of 1 comparisons." in block
    renewed = pages.renew(page, "toy", block)
    assert renewed.startswith("before\n") and renewed.endswith("\nafter") and "old" not in renewed
    assert pages.renew(renewed, "toy", block) == renewed
    with pytest.raises(ValueError, match="no place marked <!-- measured: other -->"):
        pages.renew(page, "other", block)
    plots.draw(rows(), tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 1000


def test_the_page_has_a_place_for_every_suite():
    page = pages.PERFORMANCE.read_text(encoding="utf-8")
    for suite in (*suites.SUITES, command.pipelines.SUITE, "cost model"):
        pages.renew(page, suite, "")


def test_the_page_shows_what_the_files_hold():
    """`python -m bench --page` leaves it as it is, and every long table has its file."""
    page = pages.PERFORMANCE.read_text(encoding="utf-8")
    for suite in (*suites.SUITES, *command.WHOLE):
        found = command._read(suite)
        page = pages.renew(page, suite, command._block(found))
        if len(found) > command.SHORT:
            assert command._whole(found) in command._stem(found).with_suffix(".md").read_text(
                encoding="utf-8"
            )
    assert page == pages.PERFORMANCE.read_text(encoding="utf-8")


def test_a_long_table_is_shown_by_what_providers_came_to():
    def row(work, provider, times):
        return {"suite": "toy", "work": work, "provider": provider, "times_ours": times}

    shown = command._came_to(
        [row("a", OURS, "1.00"), row("a", "x", "2.00"), row("a", "x", "0.50"), row("b", "x", "3.00")]
    )
    assert shown.splitlines()[2:] == [
        "| a | x | 2 | 0.50 | 1.25 | 2.00 |",
        "| b | x | 1 | 3.00 | 3.00 | 3.00 |",
    ]


def test_an_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["speed"])
    assert "unknown suite 'speed'" in capsys.readouterr().err


def test_peak_memory_counts_temporaries_and_not_what_was_there():
    kept = torch.ones(1 << 20)
    assert counting.peak_memory(lambda: (kept + 1).sum(), "cpu") // 2**20 == 4


def test_the_roofline_of_a_streaming_kernel_is_its_bytes():
    case = next(c for c in cases() if c.operation == "euler_step_" and c.dtype == torch.float32)
    built = case.build(case.shape, "meta")
    assert roofline.bytes_moved(built) == 12 * torch.Size(case.shape).numel()


def test_every_comparison_has_ours():
    every = list(suites.comparisons())
    assert all(OURS in c.providers and len(c.providers) > 1 for c in every)
    assert len({c.title for c in every}) == len(every)
    assert any(c.suite == noise.SUITE for c in every)
