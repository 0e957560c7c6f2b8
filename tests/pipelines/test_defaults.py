"""What a pipeline does when not told otherwise."""

import pytest

from moe_sampler import HybridPipeline


def test_a_folder_says_its_experts_solvers_and_levels(demo_pipeline, tmp_path):
    """They go together: another solver or shift has its own levels."""

    def stepping(**settings):
        return {e.name: (e.solver, e.levels) for e in pipe.experts(**settings)}

    pipe = HybridPipeline(**demo_pipeline.components, lune_solver="unip_3", lune_levels=[0.6, 0.2])
    listed = pipe.experts()[1].levels
    assert stepping() == {"sol": ("ddpm", None), "lune": ("unip_3", listed)} and listed == (0.6, 0.2)
    assert stepping(solver={"lune": "heun"}) == {"sol": ("ddpm", None), "lune": ("heun", None)}
    assert stepping(shift={"lune": 3.0})["lune"] == ("unip_3", None)
    assert stepping(levels={"lune": "karras"})["lune"] == ("unip_3", "karras")
    assert stepping(solver="dpmpp_2m", levels="beta")["sol"] == ("dpmpp_2m", "beta")
    pipe.save_pretrained(tmp_path)
    again = HybridPipeline.from_pretrained(tmp_path)
    assert [e.levels for e in again.experts()] == [None, listed] and again.config["lune_solver"] == "unip_3"
    for wrong, message in (({"lune_solver": "no_such"}, "no_such"), ({"sol_levels": "no_such"}, "no_such")):
        with pytest.raises(ValueError, match=message):
            HybridPipeline(**demo_pipeline.components, **wrong)
    with pytest.raises(TypeError, match="moon_solver"):
        HybridPipeline(**demo_pipeline.components, moon_solver="heun")
