"""Which diffusers scheduler configs are honoured, and that all others are refused with what would be fine."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import torch

from moe_sampler import Expert, plan, sample
from moe_sampler.loading.presets import training_config
from moe_sampler.sampling.scheduler_configs import check_scheduler_config

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers' own tables
]

PUBLISHED = (
    *("PNDMScheduler", "DDPMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("UniPCMultistepScheduler", "DEISMultistepScheduler", "DDIMScheduler"),
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
)


def config_of(name: str, **settings) -> dict:
    return {**getattr(diffusers, name)(**settings).config, "_class_name": name}


def read(config: dict) -> Expert:
    return Expert.from_scheduler_config("x", training_config(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_published_folders_carry_is_read(name):
    assert read(config_of(name)).path.discrete != name.startswith("Flow")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "EulerDiscreteScheduler",
            dict(use_karras_sigmas=True),
            "use_karras_sigmas = True .* set it to false",
        ),
        ("EulerDiscreteScheduler", dict(timestep_type="continuous"), "timestep_type .* set it to discrete"),
        ("EulerDiscreteScheduler", dict(final_sigmas_type="sigma_min"), "final_sigmas_type .* zero, or give"),
        ("UniPCMultistepScheduler", dict(use_exponential_sigmas=True), "use_exponential_sigmas"),
        ("UniPCMultistepScheduler", dict(thresholding=True), "thresholding = True .* set it to false"),
        ("DEISMultistepScheduler", dict(use_flow_sigmas=True), "use_flow_sigmas = True .* set it to false"),
        (
            "DPMSolverMultistepScheduler",
            dict(prediction_type="flow_prediction"),
            "use_flow_sigmas = False .* true",
        ),
        ("DPMSolverMultistepScheduler", dict(lambda_min_clipped=-5.1), "lambda_min_clipped .* -inf"),
        ("DPMSolverMultistepScheduler", dict(use_lu_lambdas=True), "use_lu_lambdas"),
        ("DPMSolverMultistepScheduler", dict(variance_type="learned_range"), "variance_type .* fixed_small"),
        ("DDPMScheduler", dict(variance_type="fixed_large"), "variance_type .* fixed_small"),
        ("DDIMScheduler", dict(timestep_spacing="traling"), "timestep_spacing = 'traling' .* trailing or"),
        ("PNDMScheduler", dict(timestep_spacing="traling"), "timestep_spacing = 'traling'"),
        ("FlowMatchEulerDiscreteScheduler", dict(shift_terminal=0.1), "shift_terminal = 0.1 .* null"),
        ("FlowMatchEulerDiscreteScheduler", dict(stochastic_sampling=True), "stochastic_sampling"),
        ("FlowMatchEulerDiscreteScheduler", dict(invert_sigmas=True), "invert_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", dict(use_beta_sigmas=True), "use_beta_sigmas"),
        (
            "FlowMatchEulerDiscreteScheduler",
            dict(rescale_betas_zero_snr=True),
            "rescale_betas_zero_snr = True .* set it to false",
        ),
        ("FlowMatchHeunDiscreteScheduler", dict(prediction_type="epsilon"), "set it to flow_prediction"),
        ("DDIMScheduler", dict(rescale_betas_zero_snr=True), "an epsilon model says nothing"),
        ("EulerDiscreteScheduler", dict(rescale_betas_zero_snr=True), "an epsilon model says nothing"),
    ],
)
def test_what_is_not_honoured_is_refused_with_what_would_be_fine(name, settings, message):
    with pytest.raises(ValueError, match=f"{name}'s .*{message}"):
        read(config_of(name) | settings)


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_unknown_keys(name):
    config = config_of(name)
    for off in (None, False):
        read(config | {"sharpness": off})
    with pytest.raises(ValueError, match=f"{name}'s sharpness = 2 is not known here"):
        read(config | {"sharpness": 2})
    with pytest.raises(ValueError, match=f"{name}'s prediction_type = 'eps'"):
        read(config | {"prediction_type": "eps"})


def test_every_key_of_the_published_schedulers_is_accounted_for():
    """Whatever a key is set to, it is read, harmless, or refused: none is a surprise."""
    for name in PUBLISHED:
        for key in config_of(name):
            try:
                check_scheduler_config({"_class_name": name, key: "nonsense"})
            except ValueError as error:
                assert "not known here" not in str(error), (name, key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("skip_prk_steps", False),
            ("predict_x0", False),
            ("solver_p", "UniPC"),
            ("disable_corrector", [0, 1]),
        ),
        *(("predictor_order", 3), ("corrector_order", 4), ("tau_func", "tau"), ("noise_sampler_seed", 7)),
        *(("interpolation_type", "log_linear"), ("lower_order_final", False), ("euler_at_final", True)),
        *(("dynamic_thresholding_ratio", 0.9), ("sample_max_value", 2.0), ("time_shift_type", "linear")),
        *(("base_shift", 0.3), ("max_shift", 2.0), ("base_image_seq_len", 64), ("max_image_seq_len", 128)),
        *(("sigma_min", 0.03), ("sigma_max", 14.6), ("rho", 5.0), ("tensor_format", "pt")),
    ],
)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_how_another_solver_steps_changes_nothing(name, key, value):
    """Nor do options of what is off."""
    config = config_of(name)
    assert read(config | {key: value}) == read(config | {key: None}) == read(config)


def test_an_experts_own_setting_takes_an_options_place():
    config = config_of("DDPMScheduler", variance_type="fixed_large", timestep_spacing="trailing")
    assert Expert.from_scheduler_config("x", config, solver="ddim").solver == "ddim"
    config = config_of("DDIMScheduler") | {"timestep_spacing": "own"}
    assert Expert.from_scheduler_config("x", config, spacing="leading").spacing == "leading"
    config = config_of("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    assert Expert.from_scheduler_config("x", config, levels="karras").levels == "karras"
    with pytest.raises(ValueError, match="set it to false, or give levels"):
        Expert.from_scheduler_config("x", config)


def test_a_replaced_solver_keeps_what_the_model_was_trained_on():
    flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    expert = read(config_of("UniPCMultistepScheduler", **flow))
    assert (expert.prediction, expert.shift) == ("flow_prediction", 5.0)
    assert read(config_of("PNDMScheduler") | dict(clip_sample=True)).clip_sample_range == 1.0
    zero = config_of("EulerDiscreteScheduler", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert read(zero).path.zero_terminal_snr


@pytest.mark.parametrize(
    "betas",
    [
        dict(trained_betas=[1e-4 * 1.006**t for t in range(1000)]),
        dict(beta_schedule="squaredcos_cap_v2"),
        dict(beta_schedule="linear"),
        dict(beta_schedule="scaled_linear"),
        dict(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    ],
    ids=lambda betas: next(iter(betas.values())) if "beta_schedule" in betas else next(iter(betas)),
)
def test_leading_timesteps_are_offset_whatever_the_betas(betas):
    for offset in (0, 1, 3):
        scheduler = diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=offset, **betas)
        scheduler.set_timesteps(10)
        expert = read({**scheduler.config, "_class_name": "DDIMScheduler"})
        found = [step.calls[0].timestep for step in plan(expert, steps=10).steps]
        assert found == scheduler.timesteps.tolist()


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_a_run_from_zero_terminal_snr_is_diffusers_own(gentle_mixture, name, prediction):
    scheduler = getattr(diffusers, name)(
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type=prediction,
        clip_sample=False,
    )
    path = read({**scheduler.config, "_class_name": name}).path

    def model(x, timestep, **_):
        return gentle_mixture.predict(prediction, x, path.level(int(timestep)))

    expert = Expert.from_scheduler_config("x", {**scheduler.config, "_class_name": name}, model, eta=0.0)
    if name == "DDPMScheduler":  # without its noise, which the two draw differently: the plan alone
        schedule = plan(expert, steps=10)
        scheduler.set_timesteps(10)
        assert [s.calls[0].timestep for s in schedule.steps] == scheduler.timesteps.tolist()
        assert schedule.steps[0].level.alpha == 0.0
        return
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(10)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    torch.testing.assert_close(sample(plan(expert, steps=10), expert, noise), x, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
)
def test_ddim_may_end_at_timestep_0(gentle_mixture, spacing, offset):
    """Stable Diffusion 2's folders say `set_alpha_to_one: false`."""
    scheduler = diffusers.DDIMScheduler(
        set_alpha_to_one=False, timestep_spacing=spacing, steps_offset=offset, clip_sample=False
    )
    config = {**scheduler.config, "_class_name": "DDIMScheduler"}
    expert = Expert.from_scheduler_config("x", training_config(config))

    def model(x, timestep, **_):
        return gentle_mixture.predict("epsilon", x, expert.path.level(int(timestep)))

    expert = dataclasses.replace(expert, model=model)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = plan(expert, steps=10)
    scheduler.set_timesteps(10)
    assert [step.calls[0].timestep for step in schedule.steps] == scheduler.timesteps.tolist()
    assert schedule.steps[-1].target == expert.path.level(0)
    if spacing == "linspace":
        return  # diffusers' steps are shorter there than the way to the next node
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    torch.testing.assert_close(sample(schedule, expert, noise), x, atol=2e-5, rtol=0)
    assert plan(dataclasses.replace(expert, solver="dpmpp_2m"), steps=4).steps[-1].target.sigma > 0
    assert Expert.from_scheduler_config("x", config, solver="dpmpp_2m").last_level.sigma == 0
