"""`rope_qk` against complex rotations in float64, its gradients against autograd's."""

import pytest
import torch
from torch.library import opcheck

from moe_sampler.kernels.rotary import rope_qk

OPS = torch.ops.moe_sampler
SHAPES = [
    pytest.param((1, 1, 1, 2), id="one pair"),
    pytest.param((2, 3, 5, 6), id="smaller than a block, odd counts"),
    pytest.param((1, 2, 16, 64), id="exactly one block"),
    pytest.param((2, 2, 37, 16), id="prime tokens"),
    pytest.param((1, 3, 26, 40), id="a width that is no power of two"),
    pytest.param((2, 1, 21, 128), id="several blocks, the last one ragged"),
    pytest.param((1, 1, 2, 1024), id="the widest head"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "fused projection"]


def qkv(generator, shape, dtype, layout="contiguous"):
    """q and k: [B, H, N, D], the two first thirds of a fused projection or tensors of their own."""
    batch, heads, tokens, width = shape
    fused = torch.randn(batch, tokens, 3, heads, width, generator=generator).to(dtype)
    q, k, _ = (t.transpose(1, 2) for t in fused.unbind(2))
    return (q, k) if layout == "fused projection" else (q.contiguous(), k.contiguous())


def angles(generator, shape):
    angle = 50 * torch.rand(shape[2], shape[3] // 2, generator=generator)
    return angle.cos(), angle.sin()


def strengths(generator, shape):
    return 0.5 + torch.rand(shape[:3], generator=generator)


def rotated(x, cos, sin, modulation=None):
    """Each pair is a complex number, multiplied by cos + i·sin."""
    real, imaginary = x[..., 0::2], x[..., 1::2]
    pairs = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).flatten(-2)
    return pairs if modulation is None else pairs * modulation[..., None]


def run(body, q, k, *tables):
    tables = [None if t is None else t.to(body.device) for t in tables]
    return rope_qk(on(body, q), on(body, k), *tables, backend=body.backend)


def on(body, x):
    """A copy on the body's device with the same strides."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=body.device)
    return copy.copy_(x)


def every_case(test):
    test = pytest.mark.parametrize("shape", SHAPES)(test)
    test = pytest.mark.parametrize("dtype", DTYPES, ids=str)(test)
    test = pytest.mark.parametrize("layout", LAYOUTS)(test)
    return pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])(test)


@every_case
def test_forward(body, generator, assert_within_rule, shape, dtype, layout, modulated):
    q, k = qkv(generator, shape, dtype, layout)
    cos, sin = angles(generator, shape)
    modulation = strengths(generator, shape) if modulated else None
    for x, result in zip((q, k), run(body, q, k, cos, sin, modulation), strict=True):
        assert result.dtype == dtype and result.is_contiguous()
        exact = rotated(
            x.double(), cos.double(), sin.double(), None if modulation is None else modulation.double()
        )
        low = rotated(x, cos.to(dtype), sin.to(dtype), None if modulation is None else modulation.to(dtype))
        assert_within_rule(result, low, exact)


@every_case
def test_gradients(body, generator, assert_within_rule, shape, dtype, layout, modulated):
    q, k = qkv(generator, shape, dtype, layout)
    cos, sin = angles(generator, shape)
    modulation = strengths(generator, shape) if modulated else None
    upstream = qkv(generator, shape, dtype, layout)

    def eager(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, modulation) if x is not None]
        tables = cos.to(dtype), sin.to(dtype), *leaves[2:]
        outputs = [rotated(x, *tables) for x in leaves[:2]]
        return torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in upstream])

    leaves = [on(body, x).requires_grad_() for x in (q, k, modulation) if x is not None]
    outputs = rope_qk(
        *leaves[:2], cos.to(body.device), sin.to(body.device), *leaves[2:], backend=body.backend
    )
    kept = [on(body, g) for g in upstream]
    before = [x.detach().clone() for x in (*leaves, *kept)]
    grads = torch.autograd.grad(outputs, leaves, kept)
    for leaf, grad, of_eager, exact in zip(leaves, grads, eager(dtype), eager(torch.float64), strict=True):
        assert grad.dtype == leaf.dtype
        assert_within_rule(grad, of_eager, exact, cap=1e-6 if grad.ndim == 4 else 1e-5)
    assert all(torch.equal(x, b) for x, b in zip((*leaves, *kept), before, strict=True))


def test_a_projection_is_read_where_it_lies(generator):
    """Gradients through views of one fused projection, and with strides that no complex view can have."""
    shape = (2, 2, 6, 8)
    cos, sin = (t.double() for t in angles(generator, shape))
    fused = torch.randn(2, 6, 3, 2, 8, generator=generator, dtype=torch.float64)
    results = []
    for function in (
        lambda q, k: rope_qk(q, k, cos, sin),
        lambda q, k: [rotated(x, cos, sin) for x in (q, k)],
    ):
        leaf = fused.clone().requires_grad_()
        q, k, v = (t.transpose(1, 2) for t in leaf.unbind(2))
        torch.nn.functional.scaled_dot_product_attention(*function(q, k), v).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)
    odd = torch.randn(2, 2, 6, 9, generator=generator)[..., 1:]
    for result in rope_qk(odd, odd, cos.float(), sin.float()):
        torch.testing.assert_close(result.double(), rotated(odd.double(), cos, sin), rtol=0, atol=1e-5)


@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["samples", "heads", "tokens"])
@pytest.mark.parametrize("which", ["q", "k"])
def test_rows_may_start_anywhere(body, generator, which, axis, modulated):
    """A stride that is no multiple of 8, in one tensor and along one axis; all others are."""
    shape, strides = (2, 3, 5, 16), [1024, 256, 32, 1]
    strides[axis] += 2
    skewed = torch.randn(4096, generator=generator).as_strided(shape, strides)
    plain = torch.randn(shape, generator=generator)
    q, k = (skewed, plain) if which == "q" else (plain, skewed)
    cos, sin = angles(generator, shape)
    modulation = strengths(generator, shape) if modulated else None
    exact = [None if table is None else table.double() for table in (cos, sin, modulation)]
    for x, result in zip((q, k), run(body, q, k, cos, sin, modulation), strict=True):
        torch.testing.assert_close(result.cpu().double(), rotated(x.double(), *exact), rtol=0, atol=1e-5)


def test_text_tokens_keep_their_bits(body, generator):
    for dtype in DTYPES:
        q, k = qkv(generator, (2, 2, 9, 16), dtype)
        cos, sin = angles(generator, q.shape)
        cos[:4], sin[:4] = 1, 0
        new_q, new_k = run(body, q, k, cos, sin)
        assert torch.equal(new_q[:, :, :4].cpu(), q[:, :, :4])
        assert torch.equal(new_k[:, :, :4].cpu(), k[:, :, :4])
        assert not torch.equal(new_q[:, :, 4:].cpu(), q[:, :, 4:])


def test_only_relative_positions_matter(body, generator):
    """The point of it all: the inner product of a rotated q and k depends on their distance alone."""
    frequency = 1.5 ** -torch.arange(8.0)
    angle = torch.arange(12.0)[:, None] * frequency
    q, k = (torch.randn(1, 1, 1, 16, generator=generator).expand(1, 1, 12, 16) for _ in range(2))
    new_q, new_k = run(body, q.contiguous(), k.contiguous(), angle.cos(), angle.sin())
    scores = (new_q @ new_k.mT)[0, 0]
    for distance in range(-5, 6):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=2e-5)


def test_gradients_that_are_broadcast(body, generator):
    q, k = qkv(generator, (2, 2, 9, 16), torch.float32)
    cos, sin = angles(generator, q.shape)
    leaf = on(body, q).requires_grad_()
    out, _ = rope_qk(leaf, on(body, k), cos.to(body.device), sin.to(body.device), backend=body.backend)
    out.sum().backward()
    expected = rotated(torch.ones_like(q), cos, -sin)
    torch.testing.assert_close(leaf.grad.cpu(), expected, rtol=0, atol=1e-6)


def test_gradcheck(generator):
    shape = (2, 2, 3, 4)
    q, k = qkv(generator, shape, torch.float64, "fused projection")
    cos, sin = (t.double() for t in angles(generator, shape))
    modulation = strengths(generator, shape).double()
    leaves = [x.clone().requires_grad_() for x in (q, k, modulation)]
    torch.autograd.gradcheck(lambda q, k: rope_qk(q, k, cos, sin), leaves[:2])
    torch.autograd.gradcheck(lambda q, k, m: rope_qk(q, k, cos, sin, m), leaves)
    torch.autograd.gradcheck(lambda m: rope_qk(q, k, cos, sin, m), leaves[2:])


def test_nan_and_empty(body, generator):
    q, k = qkv(generator, (1, 2, 5, 8), torch.float32)
    k[0, 1, 3, 5] = torch.nan
    cos, sin = angles(generator, q.shape)
    new_q, new_k = run(body, q, k, cos, sin)
    assert torch.isfinite(new_q).all()
    assert new_k.isnan().nonzero().tolist() == [[0, 1, 3, 4], [0, 1, 3, 5]]
    for shape in ((0, 2, 5, 8), (1, 2, 0, 8)):
        empty = torch.empty(shape)
        tables = cos[: shape[2]], sin[: shape[2]], torch.empty(shape[:3])
        assert all(x.shape == shape for x in run(body, empty, empty, *tables))


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (ValueError, r"q must have shape \[B, H, N, D\]", {"q": torch.ones(3, 5, 8)}),
        (ValueError, "last dimension of q must be even", {"q": torch.ones(2, 3, 5, 7)}),
        (ValueError, r"lie in \[2, 1024\], got 1026", {"q": torch.ones(2, 3, 5, 1026)}),
        (ValueError, "q must be contiguous in its last", {"q": torch.ones(2, 3, 8, 5).mT}),
        (TypeError, "q must be float32 or", {"q": torch.ones(2, 3, 5, 8).int()}),
        (ValueError, "k must have shape", {"k": torch.ones(2, 3, 4, 8)}),
        (TypeError, "k must be float32, got float16", {"k": torch.ones(2, 3, 5, 8).half()}),
        (ValueError, "k must be contiguous in its last", {"k": torch.ones(2, 3, 8, 5).mT}),
        (ValueError, r"cos must have shape \[5, 4\]", {"cos": torch.ones(5, 8)}),
        (TypeError, "cos must be float32", {"cos": torch.ones(5, 4).half()}),
        (ValueError, "sin must be contiguous", {"sin": torch.ones(4, 5).T}),
        (ValueError, "sin requires grad, and has no", {"sin": torch.ones(5, 4, requires_grad=True)}),
        (ValueError, r"modulation must have shape \[2, 3, 5\]", {"modulation": torch.ones(2, 5)}),
        (TypeError, "modulation must be float32", {"modulation": torch.ones(2, 3, 5).half()}),
        (ValueError, "backend must be None", {"backend": "cuda"}),
    ],
)
def test_refusals(error, message, changes):
    arguments = {name: torch.ones(2, 3, 5, 8) for name in ("q", "k")}
    arguments |= {name: torch.ones(5, 4) for name in ("cos", "sin")}
    with pytest.raises(error, match=message):
        rope_qk(**(arguments | changes))


@pytest.mark.interpreter
def test_the_kernel_refuses_float64():
    x, table = torch.ones(1, 1, 2, 4).double(), torch.ones(2, 2).double()
    with pytest.raises(TypeError, match="backend='torch' serves float64"):
        rope_qk(x, x, table, table, backend="triton")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])
def test_opcheck(generator, device, modulated):
    shape = (2, 2, 5, 8)
    q, k = (x.to(device) for x in qkv(generator, shape, torch.float32))
    cos, sin = (t.to(device) for t in angles(generator, shape))
    modulation = strengths(generator, shape).to(device) if modulated else None
    leaves = [None if x is None else x.clone().requires_grad_() for x in (q, k, modulation)]
    opcheck(OPS.rope_qk.default, (*leaves[:2], cos, sin, leaves[2]))
    pair = (q, k) if modulated else (None, None)
    opcheck(OPS.rope_qk_backward.default, (q.sin(), k.sin(), cos, sin, modulation, *pair))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_forward_and_backward(generator, compiler):
    shape = (2, 2, 5, 8)
    cos, sin = angles(generator, shape)
    fused, modulation = torch.randn(2, 5, 3, 2, 8, generator=generator), strengths(generator, shape)

    def loss(fused, modulation):
        q, k, v = (t.transpose(1, 2) for t in fused.unbind(2))
        q, k = rope_qk(q, k, cos, sin, modulation * 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).sin().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        leaves = [t.clone().requires_grad_() for t in (fused, modulation)]
        function(*leaves).backward()
        results.append([t.grad for t in leaves])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
