"""`rms_norm_modulate` against RMSNorm and AdaLN written out in float64, its gradients against autograd's."""

import pytest
import torch
from torch.library import opcheck

from moe_sampler.kernels import modulation
from moe_sampler.kernels.modulation import rms_norm_modulate

OPS = torch.ops.moe_sampler
SHAPES = [
    pytest.param((1, 1, 1), id="one number"),
    pytest.param((2, 1, 7), id="one row, odd width"),
    pytest.param((3, 5, 64), id="rows smaller than a program's"),
    pytest.param((2, 32, 64), id="exactly one chunk of rows"),
    pytest.param((2, 37, 48), id="prime rows, width not a power of two"),
    pytest.param((1, 70, 256), id="several chunks, the last one ragged"),
    pytest.param((1, 3, 1280), id="rows wider than a block of 1024"),
    pytest.param((1, 2, 3072), id="a wide model"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BF16_ROW = torch.ones(2, 8, dtype=torch.bfloat16)
NAMES = ("x", "weight", "scale", "shift")


def formula(x, weight=None, scale=None, shift=None, eps=1e-6):
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    y = y if scale is None else y * (1 + scale[:, None])
    return y if shift is None else y + shift[:, None]


def inputs(generator, shape, dtype, given=NAMES, small=None):
    """x, weight, scale, shift in `dtype` (all but x in `small`); scale and shift are chunks of one tensor."""
    batch, _, width = shape
    small = small or dtype
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = (1 + 0.2 * torch.randn(width, generator=generator)).to(small)
    chunks = (0.5 * torch.randn(batch, 3 * width, generator=generator)).to(small).chunk(3, dim=1)
    values = (x, weight, chunks[1], chunks[2])
    return [v if name in given else None for name, v in zip(NAMES, values, strict=True)]


def to(tensors, device=None, dtype=None, grad=False):
    moved = []
    for t in tensors:
        if t is None:
            moved.append(None)
            continue
        # The rows of a chunk keep their stride.
        base = t._base if t._base is not None and t.ndim == 2 else t
        copy = base.detach().to(device, dtype, copy=True)
        if base is not t:
            copy = copy.as_strided(t.shape, t.stride(), t.storage_offset())
        moved.append(copy.requires_grad_(grad))
    return moved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(body, generator, assert_within_rule, shape, dtype):
    given = inputs(generator, shape, dtype)
    result = rms_norm_modulate(*to(given, body.device), backend=body.backend)
    assert result.dtype == dtype and result.is_contiguous()
    assert_within_rule(result, formula(*given), formula(*to(given, dtype=torch.float64)), cap=2e-6)


@pytest.mark.parametrize(
    "given",
    [("x",), ("x", "weight"), ("x", "scale"), ("x", "shift"), ("x", "scale", "shift"), NAMES],
    ids="+".join,
)
@pytest.mark.parametrize("small", [torch.float32, torch.bfloat16], ids=str)
def test_each_part_may_be_left_out(body, generator, assert_within_rule, given, small):
    """Forward and backward, also with a float32 modulation of a bfloat16 stream."""
    tensors = inputs(generator, (2, 19, 32), torch.bfloat16, given, small)
    check_gradients(body, generator, assert_within_rule, tensors, cap=1e-4)


def test_a_float32_stream_takes_the_modulation_of_autocast(body, generator, assert_within_rule):
    """A Linear under autocast returns 16 bits; with float32 x the result is float32, as torch promotes."""
    tensors = inputs(generator, (2, 19, 32), torch.float32, NAMES, torch.bfloat16)
    check_gradients(body, generator, assert_within_rule, tensors, cap=1e-5)


def test_under_autocast(generator):
    x, linear = torch.randn(2, 5, 8, generator=generator), torch.nn.Linear(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        scale, shift = linear(torch.ones(2, 4)).chunk(2, dim=1)
        y = rms_norm_modulate(x, None, scale, shift)
    assert scale.dtype == torch.bfloat16 and y.dtype == torch.float32
    y.sum().backward()
    assert linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(body, generator, assert_within_rule, shape, dtype):
    check_gradients(body, generator, assert_within_rule, inputs(generator, shape, dtype), cap=1e-5)


def check_gradients(body, generator, assert_within_rule, given, cap):
    upstream = torch.randn(given[0].shape, generator=generator).to(given[0].dtype)

    def gradients(function, tensors, upstream):
        y = function(*tensors)
        leaves = [t for t in tensors if t is not None]
        return y, torch.autograd.grad(y, leaves, upstream.to(y.device, y.dtype))

    def fused(*tensors):
        return rms_norm_modulate(*tensors, backend=body.backend)

    low = None if given[0].dtype == torch.float32 else given[0].dtype  # None: each in its own
    y, grads = gradients(fused, to(given, body.device, grad=True), upstream)
    exact_y, exact = gradients(formula, to(given, dtype=torch.float64, grad=True), upstream)
    eager_y, eager = gradients(formula, to(given, dtype=low, grad=True), upstream)
    assert_within_rule(y, eager_y, exact_y, cap=2e-6)
    present = [t for t in given if t is not None]
    for tensor, grad, of_eager, reference in zip(present, grads, eager, exact, strict=True):
        assert grad.dtype == tensor.dtype and grad.shape == tensor.shape
        assert_within_rule(grad, of_eager, reference, cap=cap)


def test_only_wanted_gradients_are_made(generator, monkeypatch):
    asked = []
    original = modulation._backward_operator.twin
    spy = lambda *arguments: asked.append(list(arguments[-2])) or original(*arguments)  # noqa: E731
    monkeypatch.setattr(modulation._backward_operator, "twin", spy)
    monkeypatch.setattr(modulation._backward_operator, "default", spy)
    for wanted in range(1, 16):
        tensors = to(inputs(generator, (2, 5, 8), torch.float32))
        needs = [bool(wanted >> i & 1) for i in range(4)]
        for t, need in zip(tensors, needs, strict=True):
            t.requires_grad_(need)
        rms_norm_modulate(*tensors).sum().backward()
        assert asked[-1] == needs
        assert [t.grad is not None for t in tensors] == needs


def test_nothing_is_kept_without_gradients(generator):
    x = inputs(generator, (2, 5, 8), torch.float32)[0]
    assert OPS.rms_norm_modulate(x, None, None, None, 1e-6, False)[1].numel() == 0
    assert rms_norm_modulate(x).grad_fn is None
    with torch.no_grad():
        assert rms_norm_modulate(x.clone().requires_grad_()).grad_fn is None


def test_backward_leaves_its_inputs_alone(body, generator):
    tensors = to(inputs(generator, (2, 37, 48), torch.float32), body.device, grad=True)
    before = [t.detach().clone() for t in tensors]
    upstream = torch.randn(2, 37, 48, generator=generator).to(body.device)
    kept = upstream.clone()
    rms_norm_modulate(*tensors, backend=body.backend).backward(upstream)
    assert torch.equal(upstream, kept)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_gradcheck(generator):
    tensors = [None if t is None else t.double() for t in inputs(generator, (2, 3, 5), torch.float32)]
    for left_out in (None, 1, 2, 3):
        given = [None if i == left_out else t.clone().requires_grad_() for i, t in enumerate(tensors)]
        torch.autograd.gradcheck(lambda *t: rms_norm_modulate(*t, eps=1e-3), given)


def test_a_gradient_of_any_strides_will_do(body, generator):
    given = inputs(generator, (2, 6, 8), torch.float32)
    upstream = torch.randn(2, 8, 6, generator=generator).transpose(1, 2)
    results = []
    for grad in (upstream, upstream.contiguous()):
        tensors = to(given, body.device, grad=True)
        rms_norm_modulate(*tensors, backend=body.backend).backward(grad.to(body.device))
        results.append([t.grad for t in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_do_not_notice_each_other(body, generator):
    x, weight, scale, shift = to(inputs(generator, (3, 41, 32), torch.float32), body.device)
    whole = rms_norm_modulate(x, weight, scale, shift, backend=body.backend)
    for sample in range(3):
        one = slice(sample, sample + 1)
        part = rms_norm_modulate(
            x[one, 7:9].contiguous(), weight, scale[one], shift[one], backend=body.backend
        )
        torch.testing.assert_close(part, whole[one, 7:9], rtol=1e-6, atol=1e-6)


def test_nan_and_eps(body):
    x = torch.zeros(1, 3, 16, device=body.device)
    x[0, 1, 4] = torch.nan
    y = rms_norm_modulate(x, backend=body.backend)
    assert y[0, 1].isnan().all() and (y[0, ::2] == 0).all()
    y = rms_norm_modulate(torch.ones(1, 2, 16, device=body.device), eps=3.0, backend=body.backend)
    torch.testing.assert_close(y.cpu(), torch.full((1, 2, 16), 0.5))


def test_empty_is_nothing_to_do(body):
    for shape in ((0, 4, 8), (2, 0, 8)):
        x = torch.empty(shape, device=body.device, requires_grad=True)
        weight = torch.ones(8, device=body.device, requires_grad=True)
        y = rms_norm_modulate(x, weight, backend=body.backend)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape and (weight.grad == 0).all()


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (ValueError, r"x must have shape \[B, N, D\]", {"x": torch.ones(4, 8)}),
        (TypeError, "x must be float32 or float16 or bfloat16", {"x": torch.ones(2, 4, 8).int()}),
        (ValueError, "x must be contiguous", {"x": torch.ones(2, 8, 4).transpose(1, 2)}),
        (ValueError, r"must lie in \[1, 4096\], got 4097", {"x": torch.ones(1, 1, 4097)}),
        (ValueError, r"weight must have shape \[8\]", {"weight": torch.ones(4)}),
        (TypeError, "weight must be float32 or float16 or bfloat16", {"weight": torch.ones(8).double()}),
        (TypeError, "scale must be float16 or float32", {"x": torch.ones(2, 4, 8).half(), "scale": BF16_ROW}),
        (ValueError, r"scale must have shape \[2, 8\]", {"scale": torch.ones(2, 1, 8)}),
        (ValueError, "scale must be contiguous in its last", {"scale": torch.ones(8, 2).T}),
        (TypeError, "shift must be float32", {"shift": torch.ones(2, 8).double()}),
        (ValueError, "eps must be finite", {"eps": float("nan")}),
        (ValueError, "eps must be finite", {"eps": -1e-6}),
        (ValueError, "backend must be None", {"backend": "cuda"}),
    ],
)
def test_refusals(error, message, changes):
    arguments = {"x": torch.ones(2, 4, 8), "weight": torch.ones(8), "scale": torch.ones(2, 8)}
    with pytest.raises(error, match=message):
        rms_norm_modulate(**(arguments | changes))


def test_tensors_on_another_device_are_refused():
    x, elsewhere = torch.ones(2, 4, 8), torch.ones(8, device="meta")
    with pytest.raises(ValueError, match="weight is on meta, expected cpu"):
        modulation._operator.twin(x, elsewhere, None, None, 1e-6, False)


@pytest.mark.interpreter
def test_the_kernel_refuses_float64():
    with pytest.raises(TypeError, match="backend='torch' serves float64"):
        rms_norm_modulate(torch.ones(1, 2, 8).double(), backend="triton")


def test_second_derivatives_are_refused():
    x = torch.randn(1, 2, 8, requires_grad=True)
    y = rms_norm_modulate(x).square().sum()
    with pytest.raises(ValueError, match="this operation has no derivative"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("given", [("x",), NAMES], ids="+".join)
def test_opcheck(generator, device, given):
    tensors = to(inputs(generator, (2, 5, 16), torch.float32, given), device, grad=True)
    opcheck(OPS.rms_norm_modulate.default, (*tensors, 1e-6, True))
    x, weight, scale, shift = to(tensors)
    arguments = torch.randn(2, 5, 16, device=device), x, x.new_ones(2, 5), weight, scale
    for needs in ([True, weight is not None, scale is not None, shift is not None], [False] * 4):
        opcheck(OPS.rms_norm_modulate_backward.default, (*arguments, needs, torch.float32))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_forward_and_backward(generator, compiler):
    def loss(x, weight, modulation):
        scale, shift = modulation.chunk(2, dim=1)
        return rms_norm_modulate(x * 2, weight, scale, shift).sin().sum()

    x, weight, *_ = inputs(generator, (2, 5, 16), torch.float32)
    leaves = [x, weight, torch.randn(2, 32, generator=generator)]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        tensors = [t.clone().requires_grad_() for t in leaves]
        function(*tensors).backward()
        results.append([t.grad for t in tensors])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
