"""One expert alone must retrace diffusers' own schedulers: same model, same noise, float32, 50 steps."""

from __future__ import annotations

import itertools

import diffusers
import diffusers.schedulers.scheduling_ddpm as diffusers_ddpm
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from moe_sampler import (
    Expert,
    FusedDDIMScheduler,
    FusedFlowMatchEulerScheduler,
    SamplingRun,
    VPPath,
    plan,
    sample,
)
from moe_sampler.kernels import philox_normal, velocity_to_epsilon
from moe_sampler.sampling.guidance import rescaled_guidance
from moe_sampler.sampling.initial import initial_latents
from moe_sampler.sampling.predictions import velocity_to_x0, x0_to_epsilon

SHAPE, SEEDS, STEPS = (2, 4, 8, 8), [11, 12], 50
SPACINGS = ["trailing", "leading", "linspace"]
BETAS = {
    "linear": dict(beta_start=1e-4, beta_end=0.02),
    "scaled_linear": dict(beta_start=0.00085, beta_end=0.012),
}


def ours(expert: Expert, **settings) -> torch.Tensor:
    return sample(plan(expert, steps=STEPS, **settings), expert, shape=SHAPE, seeds=SEEDS)


def start() -> torch.Tensor:
    return philox_normal(SHAPE, torch.tensor(SEEDS), 0, stream=1)


def step_noise(index: int) -> torch.Tensor:
    return philox_normal(SHAPE, torch.tensor(SEEDS), index)


def vp_expert(mixture, schedule: str, prediction: str, **settings) -> Expert:
    offset = settings.pop("steps_offset", 0)
    path = getattr(VPPath, schedule)(steps_offset=offset)
    return mixture.give_model(Expert("sol", path, prediction, **settings))


def vp_scheduler(cls, schedule: str, prediction: str, **settings):
    settings = settings if "Multistep" in cls.__name__ else {"clip_sample": False, **settings}
    return cls(beta_schedule=schedule, prediction_type=prediction, **BETAS[schedule], **settings)


@pytest.fixture(scope="module")
def mixture(gentle_mixture):
    return gentle_mixture


@pytest.fixture
def same_noise(monkeypatch):
    """Hand diffusers' ancestral scheduler our noise, in order."""
    counter = iter(range(STEPS))
    monkeypatch.setattr(diffusers_ddpm, "randn_tensor", lambda *a, **k: step_noise(next(counter)))


TWO_SCHEDULES = pytest.mark.parametrize(
    ("schedule", "prediction"), [("linear", "v_prediction"), ("scaled_linear", "epsilon")]
)


@pytest.mark.parametrize("spacing", SPACINGS)
@TWO_SCHEDULES
def test_ddpm(mixture, same_noise, spacing, schedule, prediction):
    expert = vp_expert(mixture, schedule, prediction, solver="ddpm", spacing=spacing)
    scheduler = vp_scheduler(diffusers.DDPMScheduler, schedule, prediction, timestep_spacing=spacing)
    scheduler.set_timesteps(STEPS)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(expert.model(x, t), t, x).prev_sample
    torch.testing.assert_close(ours(expert), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_by_the_guides_recipe(mixture, same_noise, spacing):
    """v -> x0 -> epsilon by hand, then a scheduler that believes it samples an epsilon model."""
    expert = vp_expert(mixture, "linear", "v_prediction", solver="ddpm", spacing=spacing)
    scheduler = vp_scheduler(diffusers.DDPMScheduler, "linear", "epsilon", timestep_spacing=spacing)
    scheduler.set_timesteps(STEPS)
    x = start()
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[t].sqrt().item()
        sigma = (1 - scheduler.alphas_cumprod[t]).sqrt().item()
        v = expert.model(x, t)
        epsilon = x0_to_epsilon(velocity_to_x0(v, x, alpha, sigma), x, alpha, sigma)
        # Recovering epsilon through x0 divides by sigma, which is 0.01 at the last step.
        torch.testing.assert_close(velocity_to_epsilon(v, x, alpha, sigma), epsilon, atol=1e-4, rtol=0)
        x = scheduler.step(epsilon, t, x).prev_sample
    torch.testing.assert_close(ours(expert), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@TWO_SCHEDULES
def test_ddim(mixture, spacing, schedule, prediction, eta):
    expert = vp_expert(mixture, schedule, prediction, solver="ddim", eta=eta, spacing=spacing)
    scheduler = vp_scheduler(diffusers.DDIMScheduler, schedule, prediction, timestep_spacing=spacing)
    scheduler.set_timesteps(STEPS)
    x, timesteps = start(), [*scheduler.timesteps.tolist(), None]
    for index, (t, following) in enumerate(itertools.pairwise(timesteps)):
        # DDIMScheduler aims 1000 // steps below t, which is not its own next node under "linspace";
        # this makes its aim the node it will really be called at.
        scheduler.num_inference_steps = 1000 // (t - following) if following is not None else 1
        noise = step_noise(index) if eta else None
        x = scheduler.step(expert.model(x, torch.tensor(t)), t, x, eta=eta, variance_noise=noise).prev_sample
    torch.testing.assert_close(ours(expert), x, atol=1e-5, rtol=0)


def test_ddim_clipped(mixture):
    expert = vp_expert(mixture, "linear", "v_prediction", solver="ddim", clip_sample_range=0.5)
    scheduler = vp_scheduler(
        diffusers.DDIMScheduler,
        "linear",
        "v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
        clip_sample_range=0.5,
    )
    scheduler.set_timesteps(STEPS)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(expert.model(x, t), t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(ours(expert), x, atol=1e-5, rtol=0)
    assert x.abs().max() <= 0.5


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_flow_match_euler(mixture, shift):
    expert = mixture.give_model(Expert.lune(shift=shift))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / STEPS, STEPS).tolist())
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(expert.model(x, t), t, x).prev_sample
    torch.testing.assert_close(ours(expert), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_flow_match_euler_on_its_default_sigmas(mixture, shift):
    """Called with a step count, diffusers shifts twice; its nodes can be given as they are."""
    expert = mixture.give_model(Expert.lune(shift=shift))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(STEPS)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(expert.model(x, t), t, x).prev_sample
    nodes = scheduler.sigmas[:-1].double().tolist()
    torch.testing.assert_close(ours(expert, noise_levels=nodes), x, atol=1e-5, rtol=0)


@TWO_SCHEDULES
@pytest.mark.parametrize("order", [2, 3])
def test_dpmpp_multistep(mixture, schedule, prediction, order):
    expert = vp_expert(mixture, schedule, prediction, solver=f"dpmpp_{order}m")
    scheduler = vp_scheduler(
        diffusers.DPMSolverMultistepScheduler,
        schedule,
        prediction,
        timestep_spacing="trailing",
        solver_order=order,
    )
    scheduler.set_timesteps(STEPS)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(expert.model(x, t), t, x).prev_sample
    torch.testing.assert_close(ours(expert), x, atol=1e-5, rtol=0)


@TWO_SCHEDULES
def test_unip(mixture, schedule, prediction):
    """diffusers' UniPC without its corrector, but for the last step into the data, where it says nothing."""
    expert = vp_expert(mixture, schedule, prediction, solver="unip_3")
    scheduler = vp_scheduler(
        diffusers.UniPCMultistepScheduler,
        schedule,
        prediction,
        timestep_spacing="trailing",
        solver_order=3,
        disable_corrector=list(range(STEPS)),
        lower_order_final=False,
    )
    scheduler.set_timesteps(STEPS)
    x = start()
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(expert.model(x, t), t, x).prev_sample
    run = SamplingRun(plan(expert, steps=STEPS), expert, shape=SHAPE, seeds=SEEDS)
    torch.testing.assert_close(run.advance(until=STEPS - 1), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", [2, 3])
def test_dpmpp_multistep_on_the_flow_path(mixture, order):
    expert = mixture.give_model(Expert.lune(solver=f"dpmpp_{order}m", shift=3.0))
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", solver_order=order
    )
    scheduler.set_timesteps(STEPS)
    x = start()
    for sigma, t in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(expert.model(x, 1000 * sigma), t, x).prev_sample
    nodes = scheduler.sigmas[:-1].double().tolist()
    mine = sample(plan(expert, noise_levels=nodes), expert, start())
    torch.testing.assert_close(mine, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_heun(mixture, shift):
    expert = mixture.give_model(Expert.lune(solver="heun"))
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(STEPS)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(expert.model(x, t), t, x).prev_sample
    # Every level but the first is there twice, and the zero at the end.
    nodes = [scheduler.sigmas[0].item(), *scheduler.sigmas[1:-1:2].tolist()]
    compiled = plan(expert, noise_levels=nodes)
    assert len(compiled) == len(scheduler.timesteps) == 2 * STEPS - 1
    torch.testing.assert_close(sample(compiled, expert, start()), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])  # its "linspace" isn't rounded to timesteps
@TWO_SCHEDULES
def test_heun(mixture, spacing, schedule, prediction):
    """diffusers keeps x / alpha, whose noise has the standard deviation sigma / alpha."""
    expert = vp_expert(mixture, schedule, prediction, solver="heun", spacing=spacing)
    settings = {"timestep_spacing": spacing, "prediction_type": prediction, **BETAS[schedule]}
    scheduler = diffusers.HeunDiscreteScheduler(beta_schedule=schedule, **settings)
    scheduler.set_timesteps(STEPS)
    x = start() * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    told = []
    for t in scheduler.timesteps:
        told.append(t.item())
        x = scheduler.step(expert.model(scheduler.scale_model_input(x, t), t.long()), t, x).prev_sample
    compiled = plan(expert, steps=STEPS)
    assert [step.calls[0].timestep for step in compiled.steps] == told
    torch.testing.assert_close(sample(compiled, expert, start()), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [10, STEPS])
@TWO_SCHEDULES
def test_dpmpp_2m_sde(mixture, schedule, prediction, steps):
    expert = vp_expert(mixture, schedule, prediction, solver="dpmpp_2m_sde")
    scheduler = vp_scheduler(
        diffusers.DPMSolverMultistepScheduler,
        schedule,
        prediction,
        timestep_spacing="trailing",
        algorithm_type="sde-dpmsolver++",
    )
    scheduler.set_timesteps(steps)
    x = start()
    for index, t in enumerate(scheduler.timesteps):
        output = expert.model(x, t)
        x = scheduler.step(output, t, x, variance_noise=step_noise(index)).prev_sample
    mine = sample(plan(expert, steps=steps), expert, shape=SHAPE, seeds=SEEDS)
    torch.testing.assert_close(mine, x, atol=1e-5, rtol=0)


def test_dpmpp_2m_sde_on_the_flow_path(mixture):
    expert = mixture.give_model(Expert.lune(solver="dpmpp_2m_sde"))
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", algorithm_type="sde-dpmsolver++"
    )
    scheduler.set_timesteps(STEPS)
    x = start()
    for index, (sigma, t) in enumerate(zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True)):
        output = expert.model(x, 1000 * sigma)
        x = scheduler.step(output, t, x, variance_noise=step_noise(index)).prev_sample
    nodes = scheduler.sigmas[:-1].double().tolist()
    mine = sample(plan(expert, noise_levels=nodes), expert, start(), seeds=SEEDS)
    torch.testing.assert_close(mine, x, atol=1e-5, rtol=0)


def test_few_steps_of_dpmpp_2m(mixture):
    """With fewer than 15 steps diffusers' `lower_order_final` would matter, had its last step not to be first
    order anyway."""
    expert = vp_expert(mixture, "scaled_linear", "epsilon", solver="dpmpp_2m")
    scheduler = vp_scheduler(
        diffusers.DPMSolverMultistepScheduler, "scaled_linear", "epsilon", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(8)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(expert.model(x, t), t, x).prev_sample
    torch.testing.assert_close(sample(plan(expert, steps=8), expert, start()), x, atol=1e-5, rtol=0)


def test_solvers_are_read_from_diffusers_configs():
    def solver(scheduler, **settings) -> str:
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        return Expert.from_scheduler_config("x", config, **settings).solver

    assert solver(diffusers.FlowMatchHeunDiscreteScheduler()) == "heun"
    assert solver(diffusers.HeunDiscreteScheduler()) == "heun"
    assert solver(FusedDDIMScheduler()) == "ddim" and solver(FusedFlowMatchEulerScheduler()) == "euler"
    multistep = diffusers.DPMSolverMultistepScheduler
    assert solver(multistep()) == "dpmpp_2m"
    assert solver(multistep(algorithm_type="sde-dpmsolver++")) == "dpmpp_2m_sde"
    for unknown in (
        multistep(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
        multistep(solver_order=3),
        multistep(solver_type="heun"),
    ):
        with pytest.raises(ValueError, match=r"solver_order 2|final_sigmas_type"):
            solver(unknown)
        assert solver(unknown, solver="ddim") == "ddim"
    for option in ("use_karras_sigmas", "use_exponential_sigmas", "thresholding"):
        with pytest.raises(ValueError, match=f"{option} = True is not supported: set it to false"):
            solver(multistep(**{option: True}))
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        solver(dynamic)
    assert solver(dynamic, shift=2.0) == "euler"
    flow = multistep(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
    config = {**flow.config, "_class_name": "DPMSolverMultistepScheduler"}
    assert Expert.from_scheduler_config("x", config).shift == 5.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_guidance_rescale(dtype):
    generator = torch.Generator().manual_seed(3)
    output = torch.randn(6, 4, 8, 8, generator=generator) * torch.linspace(0.5, 2, 6).view(-1, 1, 1, 1)
    output = output.to(dtype)
    uncond, cond = output.float().chunk(2)
    guided = uncond + 7.5 * (cond - uncond)
    for rescale in (0.3, 1.0):
        expected = rescale_noise_cfg(guided, cond, rescale)
        ours = rescaled_guidance(guided, output.chunk(2)[1], rescale)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 30, 50, 999])
def test_timesteps_are_diffusers_own(spacing, steps):
    expert = Expert.sol(spacing=spacing)
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert [
        step.calls[0].timestep for step in plan(expert, steps=steps).steps
    ] == scheduler.timesteps.tolist()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_alphas_are_diffusers_own(schedule):
    scheduler = diffusers.DDPMScheduler(beta_schedule=schedule, **BETAS[schedule])
    path = getattr(VPPath, schedule)()
    np.testing.assert_allclose(path.alphas**2, scheduler.alphas_cumprod.numpy(), rtol=2e-5)
    np.testing.assert_allclose(path.alphas**2 + path.sigmas**2, 1.0, rtol=1e-14)


def test_the_first_state_is_noise_of_unit_variance():
    vp = initial_latents(plan(Expert.sol(), steps=5), SHAPE, SEEDS)
    flow = initial_latents(plan(Expert.lune(), steps=5), SHAPE, SEEDS)
    assert torch.equal(vp, flow) and torch.equal(vp, start())
