"""Forward-mode derivatives and `torch.func` of the differentiable operators, against their backward."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from moe_sampler.kernels import MinSNR, rms_norm_modulate, rope_qk, velocity_to_epsilon, weighted_mse


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


ANGLES = numbers(3, 2)
ONES = torch.ones(2, 4)
WEIGHT, MAP = torch.tensor([0.5, 2.0]), torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(1))
SNR = MinSNR(5.0, torch.tensor([0.8, 0.3]), torch.tensor([0.6, 0.7]), "flow_prediction")


def norm(x, weight, scale, shift):
    return rms_norm_modulate(x, weight, scale, shift).sin().sum()


def rotary(q, k, modulation):
    q, k = rope_qk(q, k, ANGLES.cos(), ANGLES.sin(), modulation)
    return q.sin().sum() + k.cos().sum()


def loss(prediction, target):
    return weighted_mse(prediction, target, weight=WEIGHT, weight_map=MAP, min_snr=SNR)


CASES = [
    pytest.param(norm, (numbers(2, 5, 8), numbers(8), numbers(2, 8), numbers(2, 8)), id="rms_norm_modulate"),
    pytest.param(rotary, (numbers(1, 2, 3, 4), numbers(1, 2, 3, 4), numbers(1, 2, 3)), id="rope_qk"),
    pytest.param(loss, (numbers(2, 3, 4, 5), numbers(2, 3, 4, 5)), id="weighted_mse"),
]


def backward(function, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


@pytest.mark.parametrize("function, inputs", CASES)
def test_forward_mode(function, inputs):
    tangents = [torch.ones_like(t) / (1 + i) for i, t in enumerate(inputs)]
    expected = sum((g * t).sum() for g, t in zip(backward(function, inputs), tangents, strict=True))
    value, slope = jvp(function, inputs, tuple(tangents))
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(value, function(*inputs))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip(inputs, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(function(*duals)).tangent, expected)
        assert forward_ad.unpack_dual(function(*inputs)).tangent is None


@pytest.mark.parametrize("function, inputs", CASES)
def test_functional_gradients(function, inputs):
    gradients = grad(function, argnums=tuple(range(len(inputs))))(*inputs)
    torch.testing.assert_close(gradients, backward(function, inputs))


def test_second_derivatives_and_vmap():
    curvature = hessian(lambda x: weighted_mse(x, torch.zeros(1, 2)))(torch.ones(1, 2)).view(2, 2)
    torch.testing.assert_close(curvature, torch.eye(2))
    x, scale = numbers(4, 2, 5, 8), numbers(4, 2, 8)
    mapped = vmap(lambda x, scale: rms_norm_modulate(x, scale=scale))(x, scale)
    torch.testing.assert_close(
        mapped, torch.stack([rms_norm_modulate(x[i], scale=scale[i]) for i in range(4)])
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm_modulate(x[0], torch.ones(4)), r"weight must have shape \[8\]"),
        (lambda x: rms_norm_modulate(x[0], scale=torch.ones(3, 8)), "scale must have shape"),
        (lambda x: rms_norm_modulate(x[0], shift=torch.ones(1, 4)), "shift must have shape"),
        (lambda x: rope_qk(x, x[..., :6], ONES, ONES)[0], "k must have shape"),
        (lambda x: rope_qk(x, x.half(), ONES, ONES)[0], "k must be float32, got float16"),
        (lambda x: rope_qk(x[0], x[0], ONES, ONES)[0], "q must have shape"),
        (lambda x: rope_qk(x, x, ONES[:1], ONES)[0], "cos must have shape"),
        (lambda x: rope_qk(x, x, ONES, ONES[:, :2])[0], "sin must have shape"),
        (lambda x: rope_qk(x, x, ONES, ONES, ONES)[0], "modulation must have shape"),
        (lambda x: weighted_mse(x[0], torch.ones(1, 2, 4)), "target must have shape"),
        (lambda x: weighted_mse(x[0], torch.ones(1, 2, 8), weight=torch.ones(2)), "weight must have shape"),
    ],
)
def test_checks_are_made_there_too(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        grad(lambda x: call(x).sum())(torch.ones(1, 1, 2, 8))
    with forward_ad.dual_level(), pytest.raises((ValueError, TypeError), match=message):
        call(forward_ad.make_dual(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8)))


def test_refusals():
    with pytest.raises(ValueError, match="leave backend at None or 'torch'"):
        grad(lambda x: weighted_mse(x, torch.ones(1, 2), backend="triton"))(torch.ones(1, 2))
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(1, 4), torch.ones(1, 4))
        with pytest.raises(ValueError, match="velocity has a tangent, and this operation has no forward"):
            velocity_to_epsilon(x, torch.ones(1, 4), 0.6, 0.8)
