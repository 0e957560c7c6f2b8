"""`flow_training_pair`, `ddpm_training_pair` against their formulas in float64, noise given and drawn."""

import pytest
import torch
from kernel_helpers import DTYPES, SHAPES, randn
from torch.library import opcheck

from moe_sampler.kernels import philox_normal, training_pairs
from moe_sampler.kernels.training_pairs import ddpm_training_pair, flow_training_pair

SHIFT = 3.0
FLOW = {"flow_prediction": lambda x0, z: z - x0, "reversed_flow_prediction": lambda x0, z: x0 - z}
DDPM = {
    "epsilon": lambda x0, z, alpha, sigma: z,
    "v_prediction": lambda x0, z, alpha, sigma: alpha * z - sigma * x0,
    "sample": lambda x0, z, alpha, sigma: x0,
}


def broadcast(value, x):
    return value.view(-1, *(1,) * (x.ndim - 1))


def tables(levels=1000):
    """√ᾱ and √(1 − ᾱ) of DDPM's linear schedule, in float64 and as the float32 that the operator takes."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, levels, dtype=torch.float64)).cumprod(0)
    exact = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return exact, tuple(t.float() for t in exact)


def noise_of(source, shape, dtype, generator, body):
    """(arguments, the same ε in float64)."""
    if source == "noise":
        noise = randn(generator, *shape, dtype=dtype)
        return {"noise": noise.to(body.device)}, noise.double()
    seeds = torch.arange(shape[0]) * 1_000_003 - 7
    drawn = philox_normal(shape, seeds, 5, stream=2, backend="torch")
    return {"seeds": seeds.to(body.device), "step": 5, "stream": 2}, drawn.double()


@pytest.mark.parametrize("source", ["noise", "seeds"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_flow_training_pair(body, generator, assert_within_rule, shape, dtype, source):
    prediction = list(FLOW)[len(shape) % 2]
    x0, sigma = randn(generator, *shape, dtype=dtype), torch.rand(shape[0], generator=generator)
    arguments, z = noise_of(source, shape, dtype, generator, body)
    noisy, target, timestep = flow_training_pair(
        x0.to(body.device),
        sigma.to(body.device),
        **arguments,
        shift=SHIFT,
        prediction=prediction,
        backend=body.backend,
    )
    assert noisy.dtype == target.dtype == dtype and timestep.dtype == torch.float32

    def pair(x0, s, z):
        s = SHIFT * s / (1 + (SHIFT - 1) * s)
        return (1 - s) * x0 + s * z, FLOW[prediction](x0, z)

    reference = pair(x0.double(), broadcast(sigma.double(), x0), z)
    eager = pair(x0, broadcast(sigma, x0).to(dtype), z.to(dtype))
    assert_within_rule(noisy, eager[0], reference[0])
    assert_within_rule(target, eager[1], reference[1])
    s = sigma.double()
    torch.testing.assert_close(
        timestep.cpu().double(), 1000 * SHIFT * s / (1 + (SHIFT - 1) * s), rtol=3e-7, atol=0
    )


@pytest.mark.parametrize("source", ["noise", "seeds"])
@pytest.mark.parametrize("prediction", DDPM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 3, 37, 11), (2, 4, 32, 32)], ids=["one", "odd", "blocks"])
def test_ddpm_training_pair(body, generator, assert_within_rule, shape, dtype, prediction, source):
    x0 = randn(generator, *shape, dtype=dtype)
    timesteps = torch.tensor([999, 0, 417])[: shape[0]]
    exact, rounded = tables()
    arguments, z = noise_of(source, shape, dtype, generator, body)
    given = timesteps.to(body.device)
    noisy, target, timestep = ddpm_training_pair(
        x0.to(body.device),
        given,
        *(t.to(body.device) for t in rounded),
        **arguments,
        prediction=prediction,
        backend=body.backend,
    )
    assert timestep is given and noisy.dtype == target.dtype == dtype

    def pair(x0, z, alpha, sigma):
        return alpha * x0 + sigma * z, DDPM[prediction](x0, z, alpha, sigma)

    reference = pair(x0.double(), z, *(broadcast(t[timesteps], x0) for t in exact))
    eager = pair(x0, z.to(dtype), *(broadcast(t[timesteps], x0).to(dtype) for t in rounded))
    assert_within_rule(noisy, eager[0], reference[0])
    assert_within_rule(target, eager[1], reference[1])


def test_the_noise_is_philox_normal_bit_for_bit(body):
    """With x0 = 0 the target ε − x0 is the noise alone, and at s = 1 so is the noisy sample."""
    shape, seeds = (2, 3, 37, 11), torch.tensor([11, -4], device=body.device)
    x0, ones = torch.zeros(shape, device=body.device), torch.ones(2, device=body.device)
    expected = philox_normal(shape, seeds, 9, stream=1, backend=body.backend)
    pair = flow_training_pair(x0, ones, seeds=seeds, step=9, stream=1, backend=body.backend)
    assert torch.equal(pair.target, expected) and torch.equal(pair.noisy, expected)
    exact = [t.to(body.device) for t in tables()[1]]
    timesteps = torch.tensor([3, 4], device=body.device)
    pair = ddpm_training_pair(
        x0, timesteps, *exact, seeds=seeds, step=9, stream=1, prediction="epsilon", backend=body.backend
    )
    assert torch.equal(pair.target, expected)


def test_the_ends_of_the_flow_are_exact(body, generator):
    x0, noise = (randn(generator, 2, 4, 8, 8).to(body.device) for _ in range(2))
    sigma = torch.tensor([0.0, 1.0], device=body.device)
    noisy, _, timestep = flow_training_pair(
        x0, sigma, noise=noise, shift=2.0, timestep_scale=1.0, backend=body.backend
    )
    assert torch.equal(noisy[0], x0[0]) and torch.equal(noisy[1], noise[1])
    assert timestep.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_in_another_dtype_and_noise_in_a_third(body, generator, assert_within_rule, dtype):
    x0, noise = randn(generator, 2, 4, 8, 8), randn(generator, 2, 4, 8, 8, dtype=torch.float16)
    sigma = torch.tensor([0.3, 0.8])
    noisy, target, _ = flow_training_pair(
        *(t.to(body.device) for t in (x0, sigma)),
        noise=noise.to(body.device),
        dtype=dtype,
        backend=body.backend,
    )
    s, z = broadcast(sigma, x0), noise.float()
    assert noisy.dtype == target.dtype == dtype
    reference = (1 - s.double()) * x0.double() + s.double() * z.double()
    assert_within_rule(noisy, ((1 - s) * x0 + s * z).to(dtype), reference)
    assert_within_rule(target, (z - x0).to(dtype), z.double() - x0.double())


@pytest.mark.parametrize("prediction, dtype", [("epsilon", torch.float32), ("sample", torch.bfloat16)])
def test_a_target_is_memory_of_its_own(body, generator, prediction, dtype):
    x0, noise = (randn(generator, 2, 8, dtype=dtype).to(body.device) for _ in range(2))
    exact = [t.to(body.device) for t in tables()[1]]
    timesteps = torch.tensor([3, 4], device=body.device)
    target = ddpm_training_pair(
        x0, timesteps, *exact, noise=noise, prediction=prediction, backend=body.backend
    ).target
    assert torch.equal(target, noise if prediction == "epsilon" else x0)
    assert target.data_ptr() not in (x0.data_ptr(), noise.data_ptr())


def test_nan_in_the_data_stays_visible(body):
    x0, noise = torch.zeros(2, 40, device=body.device), torch.ones(2, 40, device=body.device)
    x0[1, 17] = torch.nan
    noisy, target, _ = flow_training_pair(
        x0, torch.full((2,), 0.5, device=body.device), noise=noise, backend=body.backend
    )
    for result in (noisy, target):
        assert torch.isnan(result).nonzero().tolist() == [[1, 17]]


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (3, 0)], ids=["no samples", "empty samples"])
def test_nothing_to_do(body, shape):
    x0 = torch.empty(shape, device=body.device)
    sigma = torch.linspace(0, 1, 3, device=body.device)[: shape[0]]
    noisy, _, timestep = flow_training_pair(x0, sigma, noise=x0, backend=body.backend)
    assert noisy.shape == shape and timestep.tolist() == (1000 * sigma).tolist()


def test_a_timestep_outside_the_tables_becomes_nan_in_the_kernel(body):
    """On CUDA nobody can refuse it without waiting for the device; it must not be read out of bounds."""
    if body.backend == "torch" and body.device == "cpu":
        pytest.skip("the twin refuses it on the CPU, which test_refusals checks")
    x0 = torch.ones(4, 40, device=body.device)
    timesteps = torch.tensor([-1, 2, 3, 1 << 40], device=body.device)
    levels = [torch.full((3,), v, device=body.device) for v in (0.8, 0.6)]
    if body.backend == "torch":
        noisy, target, _ = ddpm_training_pair(x0, timesteps, *levels, noise=x0, backend=body.backend)
    else:
        pair = training_pairs.Pair(
            x0, timesteps, *levels, None, x0, 0, 0, 1.0, "v_prediction", 1.0, torch.float32
        )
        noisy, target = torch.zeros_like(x0), torch.zeros_like(x0)
        training_pairs.launch_of(pair, noisy, target, None).run(x0.device)
    for result in (noisy, target):
        assert torch.isnan(result).all(1).tolist() == [True, False, True, True]
        assert torch.isfinite(result[1]).all()


def wrong(call, error, message):
    return pytest.param(call, error, message, id=message)


X, SIGMA, SEEDS, TIMES = (
    torch.ones(2, 4),
    torch.tensor([0.2, 0.5]),
    torch.tensor([1, 2]),
    torch.tensor([0, 2]),
)
LEVELS = torch.full((3,), 0.6)


@pytest.mark.parametrize(
    "call, error, message",
    [
        wrong(lambda f, d: f(X, SIGMA), ValueError, "give seeds or noise"),
        wrong(lambda f, d: f(X, SIGMA, seeds=SEEDS, noise=X), ValueError, "not both"),
        wrong(lambda f, d: f(X.double(), SIGMA, noise=X), TypeError, "x0 must be float32 or float16"),
        wrong(lambda f, d: f(X[0, 0], SIGMA, noise=X), ValueError, r"x0 must be \[B, ...\]"),
        wrong(lambda f, d: f(X.T, SIGMA, noise=X.T), ValueError, "x0 must be contiguous"),
        wrong(
            lambda f, d: f(X.clone().requires_grad_(), SIGMA, noise=X),
            ValueError,
            "x0 requires grad, and this",
        ),
        wrong(lambda f, d: f(X, SIGMA.half(), noise=X), TypeError, "sigma must be float32"),
        wrong(lambda f, d: f(X, SIGMA[:1], noise=X), ValueError, "sigma must have shape"),
        wrong(lambda f, d: f(X, SIGMA * 3, noise=X), ValueError, r"sigma must lie in \[0, 1\]"),
        wrong(lambda f, d: f(X, -SIGMA, noise=X), ValueError, r"sigma must lie in \[0, 1\], where"),
        wrong(lambda f, d: f(X, SIGMA * torch.nan, noise=X), ValueError, "where 1 is noise"),
        wrong(lambda f, d: f(X, SIGMA, noise=X[:1]), ValueError, "noise must have shape"),
        wrong(lambda f, d: f(X, SIGMA, noise=X.int()), TypeError, "noise must be float32 or"),
        wrong(lambda f, d: f(X, SIGMA, seeds=SEEDS.int()), TypeError, "seeds must be int64"),
        wrong(lambda f, d: f(X, SIGMA, seeds=SEEDS[:1]), ValueError, "seeds must have shape"),
        wrong(lambda f, d: f(X, SIGMA, seeds=SEEDS, step=-1), ValueError, "step must lie in"),
        wrong(lambda f, d: f(X, SIGMA, seeds=SEEDS, stream=-1), ValueError, "stream must lie in"),
        wrong(lambda f, d: f(X, SIGMA, noise=X, shift=0), ValueError, "shift must be positive"),
        wrong(
            lambda f, d: f(X, SIGMA, noise=X, shift=float("nan")), ValueError, "shift must be positive and"
        ),
        wrong(
            lambda f, d: f(X, SIGMA, noise=X, timestep_scale=float("inf")),
            ValueError,
            "timestep_scale must be",
        ),
        wrong(
            lambda f, d: f(X, SIGMA, noise=X, prediction="epsilon"), ValueError, "one of flow_prediction, rev"
        ),
        wrong(lambda f, d: f(X, SIGMA, noise=X, dtype=torch.int32), TypeError, "dtype must be float32"),
        wrong(lambda f, d: f(X, SIGMA, noise=X, backend="cuda"), ValueError, "backend must be None"),
        wrong(lambda f, d: d(X, TIMES, LEVELS, LEVELS), ValueError, "give seeds or noise$"),
        wrong(
            lambda f, d: d(X, TIMES + 1, LEVELS, LEVELS, noise=X), ValueError, r"timesteps must lie in \[0, 3"
        ),
        wrong(lambda f, d: d(X, TIMES - 1, LEVELS, LEVELS, noise=X), ValueError, r"lie in \[0, 3\), as the"),
        wrong(lambda f, d: d(X, TIMES.int(), LEVELS, LEVELS, noise=X), TypeError, "timesteps must be int64"),
        wrong(lambda f, d: d(X, TIMES[:1], LEVELS, LEVELS, noise=X), ValueError, "timesteps must have shape"),
        wrong(
            lambda f, d: d(X, TIMES, LEVELS.double(), LEVELS, noise=X), TypeError, "alphas must be float32"
        ),
        wrong(
            lambda f, d: d(X, TIMES, LEVELS[None], LEVELS, noise=X), ValueError, r"alphas must have shape \[T"
        ),
        wrong(lambda f, d: d(X, TIMES, LEVELS[:0], LEVELS[:0], noise=X), ValueError, "a level a timestep"),
        wrong(lambda f, d: d(X, TIMES, LEVELS, LEVELS[:2], noise=X), ValueError, "sigmas must have shape"),
        wrong(
            lambda f, d: d(X, TIMES, LEVELS, LEVELS, noise=X, prediction="flow_prediction"),
            ValueError,
            "prediction must be one of epsilon, v_prediction",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(flow_training_pair, ddpm_training_pair)


OPERATOR = torch.ops.moe_sampler.training_pair.default


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x0, sigma, seeds = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([3, 4])
    opcheck(OPERATOR, (x0, sigma, None, None, seeds, None, 1, 2, 3.0, "flow_prediction", 1000.0, dtype))
    alphas, sigmas = tables()[1]
    for prediction in DDPM:
        levels = torch.tensor([5, 999]), alphas, sigmas
        opcheck(OPERATOR, (x0, *levels, None, x0.half(), 0, 0, 1.0, prediction, 1.0, dtype))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_graph_breaks(generator, device):
    x0, noise = randn(generator, 2, 4, 8, 8).to(device), randn(generator, 2, 4, 8, 8).to(device)
    sigma, seeds = torch.tensor([0.2, 0.7], device=device), torch.tensor([3, 4], device=device)
    timesteps, levels = torch.tensor([5, 999], device=device), [t.to(device) for t in tables()[1]]

    def pairs(x0, step):
        flow = flow_training_pair(x0 * 2, sigma, seeds=seeds, step=step, shift=3.0)
        ddpm = ddpm_training_pair(x0, timesteps, *levels, noise=noise)
        return *flow, *ddpm, flow.noisy + ddpm.target

    torch.testing.assert_close(torch.compile(pairs, fullgraph=True)(x0, 4), pairs(x0, 4))
