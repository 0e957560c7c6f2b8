"""What only a GPU can show: no waiting for the device, CUDA graphs, grids and devices beyond the first."""

from contextlib import contextmanager

import pytest
import torch
from waits import waits_are_errors

from moe_sampler import Crossfade, Expert, SamplingRun, plan
from moe_sampler.kernels import euler_step_, make_row, philox_normal, sampler_step_

pytestmark = pytest.mark.gpu
SHAPE = (2, 4, 64, 64)
ROW = make_row(p=1.1, a=0.9, b=0.2, d_0=0.1, keep_x0=1, n=0.3, q_cond_0=-2, q_uncond_0=1.5, scale_0=0.7)


def arguments():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=generator).cuda()
    output = torch.randn(4, *SHAPE[1:], generator=generator).half().cuda()
    table = torch.tensor([ROW] * 4).cuda()
    history, next_input = torch.zeros_like(x), torch.zeros_like(output)
    seeds = torch.tensor([1, 2]).cuda()
    return x, output, table, history, next_input, seeds


def advance(x, output, table, history, next_input, seeds):
    for step in range(4):
        sampler_step_(x, [output], table, step, memories=[history], next_inputs=[next_input], seeds=seeds)
    return x


@contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    with waits_are_errors():
        yield


def test_a_loop_never_waits_for_the_device():
    given = arguments()
    advance(*given)  # compiles
    with waiting_is_an_error():
        advance(*given)
        philox_normal(SHAPE, given[-1], 3)


def shifted(x, timestep, shift):
    return (0.3 * x.float() + shift.view(-1, 1, 1, 1)).to(x.dtype)


def sampler_run(device="cuda"):
    """Both experts, each guided, faded into each other, with fresh noise and history: every kind of step."""
    experts = [
        Expert.sol(shifted, guidance_scale=3.0, dtype=torch.float16),
        Expert.lune(shifted, guidance_scale=2.0, dtype=torch.bfloat16, solver="dpmpp_2m"),
    ]
    compiled = plan(experts, Crossfade("sol", "lune", start=0.8, end=0.6), steps=12)
    cond = {"shift": torch.tensor([0.1, 0.2], device=device)}
    uncond = {"shift": torch.zeros(2, device=device)}
    return SamplingRun(compiled, experts, shape=SHAPE, seeds=[1, 2], cond=cond, uncond=uncond, device=device)


def test_a_sampler_run_never_waits_for_the_device():
    expected = sampler_run().advance()  # compiles
    run = sampler_run()
    run.advance(1)  # the plan's table goes to the device
    with waiting_is_an_error():
        latents = run.advance()
    assert torch.equal(latents, expected)


def test_a_captured_sampler_run_replays():
    expected = sampler_run().advance()
    run = sampler_run()
    run.advance(1)
    state = run.x
    start = state.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.advance()
    state.copy_(start)
    graph.replay()
    torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_a_sampler_run_on_cuda_is_the_cpus():
    """To the rounding of the models' half precision."""
    there, here = sampler_run().advance().cpu(), sampler_run("cpu").advance()
    torch.testing.assert_close(there, here, rtol=0, atol=0.02)


def test_a_captured_loop_replays():
    expected = advance(*arguments()).clone()
    given = arguments()
    start = given[0].clone()
    advance(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance(*given)
    given[0].copy_(start)
    given[3].zero_()
    graph.replay()
    torch.testing.assert_close(given[0], expected, rtol=0, atol=0)


def test_one_captured_step_takes_every_row_in_turn():
    given = arguments()
    x, output, table, history, next_input, seeds = given
    table[1:, 2] *= torch.tensor([0.5, 2.0, 3.0], device="cuda")
    start, expected = x.clone(), advance(*(t.clone() for t in given))
    timesteps, told = torch.tensor([900.0, 600.0, 300.0, 0.0]).cuda(), torch.tensor(900).cuda()
    position, seen = torch.zeros(2, dtype=torch.int32, device="cuda"), []

    def step():
        moving = {"position": position, "timesteps": timesteps, "next_timestep": told}
        sampler_step_(
            x, [output], table, 0, memories=[history], next_inputs=[next_input], seeds=seeds, **moving
        )

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):  # from whatever the last run left in memory
        x.copy_(start)
        history.zero_()
        position.zero_()
        for _ in range(4):
            graph.replay()
            seen.append((*position.tolist(), told.item()))
        assert torch.equal(x, expected)
    assert seen == [(1, 0, 600), (2, 0, 300), (3, 0, 0), (4, 0, 0)] * 3


def test_more_samples_than_a_second_grid_axis_holds():
    x = torch.randn(70_000, 3, device="cuda")
    velocity, sigma = torch.randn_like(x), torch.rand(70_000, device="cuda")
    expected = euler_step_(x.clone(), velocity, sigma, 0.0, backend="torch")
    torch.testing.assert_close(euler_step_(x, velocity, sigma, 0.0), expected)


def test_kernel_and_twin_make_the_same_noise():
    seeds = torch.tensor([5, -6]).cuda()
    kernel = philox_normal(SHAPE, seeds, 7, stream=1)
    torch.testing.assert_close(
        kernel, philox_normal(SHAPE, seeds, 7, stream=1, backend="torch"), rtol=1e-6, atol=0
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current_one():
    z = philox_normal(SHAPE, [5, 6], device="cuda:1")
    assert z.device.index == 1
    torch.testing.assert_close(z.cpu(), philox_normal(SHAPE, [5, 6]), rtol=1e-6, atol=0)
