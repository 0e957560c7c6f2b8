"""What only a GPU can show: no waiting for the device, CUDA graphs, grids and devices beyond the first."""

import pytest
import torch

from moe_sampler.kernels import euler_step_, make_row, philox_normal, sampler_step_

pytestmark = pytest.mark.gpu
SHAPE = (2, 4, 64, 64)
ROW = make_row(p=1.1, a=0.9, b=0.2, d=0.1, n=0.3, q_cond_0=-2, q_uncond_0=1.5, scale_0=0.7)


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
        sampler_step_(x, [output], table, step, x0_prev=history, next_inputs=[next_input], seeds=seeds)
    return x


def test_a_loop_never_waits_for_the_device():
    given = arguments()
    advance(*given)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        advance(*given)
        philox_normal(SHAPE, given[-1], 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
