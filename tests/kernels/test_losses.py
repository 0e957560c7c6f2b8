"""`weighted_mse` and its gradients against the formula in float64, differentiated by torch."""

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import DTYPES, SHAPES, randn
from torch.library import opcheck

from moe_sampler.kernels.loss_weights import MinSNR, min_snr_weight
from moe_sampler.kernels.losses import weighted_mse

# (shape of the prediction, size of tokens, shape of the map)
MAPS = [
    pytest.param((2, 4, 32, 32), None, (8, 8), id="the usual map of an image"),
    pytest.param((1, 3, 37, 11), None, (8, 8), id="odd sides, one of them barely larger"),
    pytest.param((2, 1, 4, 4), None, (9, 7), id="downsampling"),
    pytest.param((2, 3, 5, 8), None, (1, 1), id="one texel"),
    pytest.param((2, 2, 8, 16), None, (8, 16), id="a texel a pixel"),
    pytest.param((2, 3, 1, 20), None, (8, 8), id="one row"),
    pytest.param((2, 256, 16), (16, 16), (8, 8), id="the usual map of tokens"),
    pytest.param((2, 407, 3), (37, 11), (5, 4), id="odd tokens"),
    pytest.param((1, 20, 1), (20, 1), (3, 2), id="one channel, one column"),
    pytest.param((2, 4, 8), (2, 2), (8, 8), id="downsampled to tokens"),
]
KINDS = ["epsilon", "v_prediction", "flow_prediction", "reversed_flow_prediction", "sample"]


def moved(body, *tensors):
    return tuple(None if t is None else t.to(body.device) for t in tensors)


def plain(prediction, target, weight=None, weight_map=None, size=None):
    """[B], in the precision of its arguments."""
    error = (prediction - target) ** 2
    if weight_map is not None:
        spread = F.interpolate(
            weight_map[:, None], size=size or prediction.shape[2:], mode="bilinear", align_corners=False
        )
        error = error * (spread.flatten(2).transpose(1, 2) if size else spread)
    loss = error.reshape(len(error), -1).mean(1)
    return loss if weight is None else loss * weight


def with_gradients(loss_of, prediction, target, factor):
    """The losses, and the gradients of Σ factor·loss; the float64 leaf copies are the caller's dtypes."""
    leaves = tuple(t.detach().clone().requires_grad_() for t in (prediction, target))
    losses = loss_of(*leaves)
    (losses * factor).sum().backward()
    return losses.detach(), leaves[0].grad, leaves[1].grad


def check(body, assert_within_rule, prediction, target, factor, weight=None, weight_map=None, size=None):
    def ours(p, t):
        w, m = moved(body, weight, weight_map)
        return weighted_mse(p, t, weight=w, weight_map=m, size=size, reduction="none", backend=body.backend)

    def in_dtype(dtype):
        w, m = (None if t is None else t.to(dtype) for t in (weight, weight_map))
        return lambda p, t: plain(p.to(dtype), t.to(dtype), w, m, size)

    result = with_gradients(ours, *moved(body, prediction, target, factor))
    reference = with_gradients(in_dtype(torch.float64), prediction.double(), target.double(), factor.double())
    eager = with_gradients(in_dtype(prediction.dtype), prediction, target, factor.to(prediction.dtype))
    assert result[0].dtype == torch.float32
    assert result[1].dtype == prediction.dtype and result[2].dtype == target.dtype
    for r, e, exact in zip(result, eager, reference, strict=True):
        assert_within_rule(r, e, exact, cap=2e-6)


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients(body, generator, assert_within_rule, shape, dtype, weighted):
    prediction, target = (randn(generator, *shape, dtype=dtype) for _ in range(2))
    factor = torch.rand(shape[0], generator=generator)
    weight = 3 * torch.rand(shape[0], generator=generator) if weighted else None
    check(body, assert_within_rule, prediction, target, factor, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, size, map_shape", MAPS)
def test_map(body, generator, assert_within_rule, shape, size, map_shape, dtype):
    prediction, target = (randn(generator, *shape, dtype=dtype) for _ in range(2))
    weight, factor = (torch.rand(shape[0], generator=generator) for _ in range(2))
    weight_map = 2 * torch.rand(shape[0], *map_shape, generator=generator)
    check(body, assert_within_rule, prediction, target, factor, weight, weight_map, size)


@pytest.mark.parametrize("prediction_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_each_gradient_comes_in_its_own_dtype(body, generator, prediction_dtype, target_dtype):
    prediction, target = moved(
        body,
        randn(generator, 2, 4, 8, 8, dtype=prediction_dtype),
        randn(generator, 2, 4, 8, 8, dtype=target_dtype),
    )
    loss, *slopes = with_gradients(
        lambda p, t: weighted_mse(p, t, backend=body.backend), prediction, target, 1.0
    )
    assert loss.shape == () and loss.dtype == torch.float32
    assert [s.dtype for s in slopes] == [prediction_dtype, target_dtype]
    difference = prediction.double() - target.double()
    torch.testing.assert_close(loss.double(), difference.square().mean(), rtol=1e-6, atol=0)
    expected = 2 * difference / difference.numel()
    for slope, sign in zip(slopes, (1, -1), strict=True):
        torch.testing.assert_close(sign * slope.double(), expected, rtol=1.2e-2, atol=1e-7)


@pytest.mark.parametrize("which", [0, 1], ids=["prediction", "target"])
def test_a_gradient_nobody_wants_is_not_made(body, generator, which):
    tensors = list(moved(body, randn(generator, 2, 40), randn(generator, 2, 40)))
    tensors[which].requires_grad_()
    weighted_mse(*tensors, backend=body.backend).backward()
    difference = (tensors[0] - tensors[1]).detach() * (1 - 2 * which)
    torch.testing.assert_close(tensors[which].grad, difference / 40)
    assert tensors[1 - which].grad is None


def test_small_gradients_in_half_survive_until_they_are_scaled(body):
    """2/n·difference underflows in float16 by itself; with the loss scaled, as in training, it must not."""
    prediction = torch.full((1, 1 << 14), 2.0**-8, dtype=torch.float16, device=body.device).requires_grad_()
    loss = weighted_mse(prediction, torch.zeros_like(prediction), backend=body.backend)
    (loss * 2.0**20).backward()
    assert torch.equal(prediction.grad, torch.full_like(prediction, 2.0 ** (1 - 14 - 8 + 20)))


def exact_min_snr(alpha, sigma, gamma, kind):
    """min(SNR, γ)·q², with q from x0 = p·x + q·output: the error of x0 that the output's error makes."""
    q = {
        "epsilon": sigma / alpha,
        "v_prediction": sigma / (alpha**2 + sigma**2),
        "flow_prediction": sigma / (alpha + sigma),
        "reversed_flow_prediction": sigma / (alpha + sigma),
        "sample": torch.ones_like(alpha),
    }[kind]
    return (alpha**2 / sigma**2).clamp(max=gamma) * q**2


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr(body, generator, kind):
    prediction, target = randn(generator, 6, 3, 7), randn(generator, 6, 3, 7)
    weight, gamma = torch.rand(6, generator=generator), 5.0
    if "flow" in kind:
        sigma = torch.tensor([1e-3, 0.2, 0.3, 0.31, 0.8, 0.999])
        alpha = 1 - sigma
    else:
        alpha = torch.tensor([1e-3, 0.2, 0.5, 0.7, 0.95, 0.999])
        sigma = (1 - alpha**2).sqrt()
    exact = exact_min_snr(alpha.double(), sigma.double(), gamma, kind)
    torch.testing.assert_close(min_snr_weight(alpha.double(), sigma.double(), gamma, kind), exact)
    p, t, w, a, s = moved(body, prediction, target, weight, alpha, sigma)
    p.requires_grad_()
    min_snr = MinSNR(gamma, a, s, kind)
    losses = weighted_mse(p, t, weight=w, min_snr=min_snr, reduction="none", backend=body.backend)
    difference = prediction.double() - target.double()
    expected = difference.square().mean((1, 2)) * weight.double() * exact
    torch.testing.assert_close(losses.detach().cpu().double(), expected, rtol=2e-6, atol=1e-9)
    losses.sum().backward()
    slope = 2 / 21 * difference * (weight.double() * exact)[:, None, None]
    torch.testing.assert_close(p.grad.cpu().double(), slope, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(
    "kind, expected",
    [("epsilon", [1, 0]), ("v_prediction", [0, 0]), ("flow_prediction", [0, 0]), ("sample", [0, 5])],
)
def test_min_snr_at_the_ends(body, kind, expected):
    """At pure noise (α = 0) and clean data (σ = 0) every weight is finite."""
    alpha, sigma = moved(body, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    assert min_snr_weight(alpha, sigma, 5.0, kind).tolist() == expected
    ones = torch.ones(2, 20, device=body.device)
    min_snr = MinSNR(5.0, alpha, sigma, kind)
    losses = weighted_mse(ones, 0 * ones, min_snr=min_snr, reduction="none", backend=body.backend)
    assert losses.tolist() == expected


def test_min_snr_of_a_velocity_on_the_flow_path():
    s = torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = torch.minimum((1 - s) ** 2, 5 * s**2)
    for kind in ("flow_prediction", "reversed_flow_prediction"):
        torch.testing.assert_close(min_snr_weight(1 - s, s, 5.0, kind), expected)


@pytest.mark.parametrize("where", ["prediction", "target", "weight", "weight_map", "alpha"])
def test_nan_stays_visible(body, where):
    t = {name: torch.ones(2, 1, 8, 8) for name in ("prediction", "target")}
    t |= {"weight": torch.ones(2), "weight_map": torch.ones(2, 4, 4), "alpha": torch.full((2,), 0.5)}
    t = {name: tensor.to(body.device) for name, tensor in t.items()}
    t["target"] = t["target"] * 3
    t[where].view(2, -1)[1, -1] = torch.nan
    min_snr = MinSNR(5.0, t["alpha"], torch.full_like(t["alpha"], 0.5), "v_prediction")
    losses = weighted_mse(
        t["prediction"],
        t["target"],
        weight=t["weight"],
        weight_map=t["weight_map"],
        min_snr=min_snr,
        reduction="none",
        backend=body.backend,
    )
    assert torch.isnan(losses).tolist() == [False, True]


def test_the_same_bits_every_time(body, generator):
    prediction, target = moved(body, randn(generator, 3, 5000), randn(generator, 3, 5000))
    losses = [weighted_mse(prediction, target, reduction="none", backend=body.backend) for _ in range(3)]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def test_inputs_and_saved_residual_are_not_written_over(body, generator):
    prediction, target = moved(body, randn(generator, 2, 3, 8, 8), randn(generator, 2, 3, 8, 8))
    weight, weight_map = moved(body, torch.tensor([2.0, 3.0]), torch.rand(2, 4, 4, generator=generator))
    before = [t.clone() for t in (prediction, target, weight, weight_map)]
    leaf = prediction.clone().requires_grad_()
    loss = weighted_mse(leaf, target, weight=weight, weight_map=weight_map, backend=body.backend)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(first, second)
    for tensor, copy in zip((leaf.detach(), target, weight, weight_map), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("case", ["plain", "image", "tokens"])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_gradcheck(generator, case, backend):
    shape = (2, 6, 3) if case == "tokens" else (2, 3, 3, 2)
    tensors = [torch.randn(shape, generator=generator).double().requires_grad_() for _ in range(2)]
    levels = torch.tensor([0.3, 0.9]), torch.tensor([0.7, 0.1])
    options = {"weight": torch.tensor([2.0, -0.5]), "min_snr": MinSNR(5.0, *levels, "flow_prediction")}
    if case != "plain":
        options["weight_map"] = torch.rand(2, 2, 4, generator=generator)
    if case == "tokens":
        options["size"] = (3, 2)
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            lambda p, t: weighted_mse(p, t, **options, reduction=reduction, backend=backend),  # noqa: B023
            tensors,
        )


def test_a_second_derivative_is_an_error_not_a_silent_zero():
    x = torch.ones(1, 4, requires_grad=True)
    loss = weighted_mse(x, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="residual requires grad, and this operation has no derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_nothing_is_kept_without_a_gradient(generator):
    """The second output is what backward needs: the prediction's size, or nothing."""
    x, y = randn(generator, 2, 8), randn(generator, 2, 8)
    arguments = (None, None, 0, 0, False, None, None, 1.0, "")
    assert OPERATOR(x, y, *arguments, False)[1].numel() == 0
    assert OPERATOR(x, y, *arguments, True)[1].shape == x.shape
    with torch.no_grad():
        assert weighted_mse(x.clone().requires_grad_(), y).grad_fn is None


OPERATOR = torch.ops.moe_sampler.weighted_mse.default
BACKWARD = torch.ops.moe_sampler.weighted_mse_backward.default


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(generator, dtype):
    x, y = randn(generator, 2, 3, 8, 8, dtype=dtype).requires_grad_(), randn(generator, 2, 3, 8, 8)
    weight, levels = torch.tensor([0.5, 2.0]), (torch.tensor([0.3, 0.9]), torch.tensor([0.7, 0.1]))
    weight_map = torch.rand(2, 4, 4, generator=generator)
    opcheck(OPERATOR, (x, y, weight, weight_map, 8, 8, False, *levels, 5.0, "flow_prediction", True))
    opcheck(OPERATOR, (x.detach(), y, None, None, 0, 0, False, None, None, 1.0, "", False))
    for dtypes in ((dtype, None), (None, torch.float32), (dtype, torch.float32)):
        opcheck(BACKWARD, (x.detach(), weight, *dtypes))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_graph_breaks(generator, device):
    model = torch.nn.Conv2d(4, 4, 1).to(device)
    x, y = randn(generator, 2, 4, 8, 8).to(device), randn(generator, 2, 4, 8, 8).to(device)
    weight_map = torch.rand(2, 4, 4, generator=generator).to(device)
    levels = torch.tensor([0.3, 0.9], device=device), torch.tensor([0.7, 0.1], device=device)

    def loss_of(x, y):
        min_snr = MinSNR(5.0, *levels, "flow_prediction")
        return weighted_mse(model(x), y, weight_map=weight_map, min_snr=min_snr)

    def run(loss_of):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = loss_of(*leaves)
        return loss.detach(), torch.autograd.grad(loss, (*leaves, model.weight))

    torch.testing.assert_close(run(torch.compile(loss_of, fullgraph=True)), run(loss_of))


def wrong(options, error, message):
    return pytest.param(options, error, message, id=message)


MAP, ONES = torch.ones(2, 4, 4), torch.ones(2)
GRAD = torch.ones(2).requires_grad_()


@pytest.mark.parametrize(
    "options, error, message",
    [
        wrong({"prediction": torch.ones(2, 3, 8, 8).int()}, TypeError, "prediction must be float32 or"),
        wrong(
            {"prediction": torch.ones(2, 3, 8, 8).transpose(2, 3)}, ValueError, "prediction must be contig"
        ),
        wrong({"prediction": torch.ones(2, 0, 8, 8)}, ValueError, "target must have shape"),
        wrong(
            {"prediction": torch.ones(2, 0), "target": torch.ones(2, 0)},
            ValueError,
            "with an element a sample",
        ),
        wrong({"target": torch.ones(2, 3, 8, 4)}, ValueError, r"target must have shape \[2, 3, 8, 8\]"),
        wrong({"target": torch.ones(2, 3, 8, 8).to("meta")}, ValueError, "target is on meta"),
        wrong({"weight": ONES.half()}, TypeError, "weight must be float32"),
        wrong({"weight": torch.ones(3)}, ValueError, r"weight must have shape \[2\]"),
        wrong({"weight": GRAD}, ValueError, "weight requires grad, which only prediction and target may"),
        wrong({"weight_map": MAP.half()}, TypeError, "weight_map must be float32"),
        wrong({"weight_map": MAP[:1]}, ValueError, r"weight_map must have shape \[2, h, w\]"),
        wrong({"weight_map": MAP[:, None]}, ValueError, r"\[2, h, w\], got \[2, 1, 4, 4\]"),
        wrong({"weight_map": MAP[:, :0]}, ValueError, r"\[2, h, w\], got \[2, 0, 4\]"),
        wrong({"weight_map": MAP.transpose(1, 2)[:, :2]}, ValueError, "weight_map must be contiguous"),
        wrong({"weight_map": MAP.clone().requires_grad_()}, ValueError, "weight_map requires grad"),
        wrong({"weight_map": MAP, "size": (8, 8)}, ValueError, "size 8×8 is that of tokens"),
        wrong(
            {"weight_map": MAP, "prediction": torch.ones(2, 9, 3), "target": torch.ones(2, 9, 3)},
            ValueError,
            r"a weight_map needs prediction \[B, C, H, W\]",
        ),
        wrong(
            {"size": (3, 4), "prediction": torch.ones(2, 9, 3), "target": torch.ones(2, 9, 3)},
            ValueError,
            r"size 3×4 is that of tokens \[B, 12, C\], got \[2, 9, 3\]",
        ),
        wrong({"min_snr": MinSNR(0.0, ONES, ONES, "epsilon")}, ValueError, "gamma must be positive"),
        wrong({"min_snr": MinSNR(float("nan"), ONES, ONES, "epsilon")}, ValueError, "finite, got nan"),
        wrong({"min_snr": MinSNR(5.0, ONES, ONES, "velocity")}, ValueError, "prediction must be one of eps"),
        wrong(
            {"min_snr": MinSNR(5.0, torch.ones(3), ONES, "sample")}, ValueError, "min_snr's alpha must have"
        ),
        wrong({"min_snr": MinSNR(5.0, ONES, ONES.double(), "sample")}, TypeError, "min_snr's sigma must be"),
        wrong({"min_snr": MinSNR(5.0, GRAD, ONES, "sample")}, ValueError, "alpha requires grad"),
        wrong({"min_snr": MinSNR(5.0, ONES, GRAD, "sample")}, ValueError, "sigma requires grad"),
        wrong({"reduction": "sum"}, ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
        wrong({"backend": "cuda"}, ValueError, "backend must be None"),
    ],
)
def test_refusals(options, error, message):
    arguments = {"prediction": torch.ones(2, 3, 8, 8), "target": torch.zeros(2, 3, 8, 8)} | options
    with pytest.raises(error, match=message):
        weighted_mse(**arguments)


@pytest.mark.parametrize("which", [0, 1], ids=["prediction", "target"])
def test_the_kernel_refuses_float64_and_says_who_serves_it(body, which):
    if body.backend == "torch":
        pytest.skip("the twin serves it, which test_gradcheck checks")
    tensors = [torch.ones(2, 4, device=body.device) for _ in range(2)]
    tensors[which] = tensors[which].double()
    with pytest.raises(TypeError, match="got float64: backend='torch' serves it"):
        weighted_mse(*tensors, backend=body.backend)


def test_no_samples_make_no_losses(body):
    x = torch.ones(0, 1, 4, 4, device=body.device)
    weight_map = torch.ones(0, 2, 2, device=body.device)
    losses = weighted_mse(x, x, weight_map=weight_map, reduction="none", backend=body.backend)
    assert losses.shape == (0,)
