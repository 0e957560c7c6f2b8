"""`philox_normal`: the integers against Philox written out here, the floats against their distribution."""

import math

import numpy as np
import pytest
import torch

from moe_sampler.kernels import philox_normal
from moe_sampler.kernels.noise import normal_of_steps

MASK = (1 << 64) - 1
SHAPES = [
    pytest.param((3,), id="one number a sample"),
    pytest.param((1, 1), id="one element"),
    pytest.param((2, 7), id="less than one Philox block"),
    pytest.param((3, 8), id="exactly one Philox block"),
    pytest.param((1, 4, 16, 16), id="exactly one block"),
    pytest.param((2, 1021), id="prime"),
    pytest.param((2, 4, 32, 32), id="several blocks"),
]


def philox_words(seed, step, stream, count):
    """Philox 4×64-10 from Salmon et al. 2011 with Python's integers; the first block's counter is 1."""
    words = []
    for block in range(1, (count + 3) // 4 + 1):
        counter, key = [block, step, stream, 0], [seed & MASK, 0]
        for _ in range(10):
            high_0, low_0 = divmod(0xD2E7470EE14C6C93 * counter[0], 1 << 64)
            high_1, low_1 = divmod(0xCA5A826395121157 * counter[2], 1 << 64)
            counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
            key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
        words += counter
    return words[:count]


def normals(words):
    """Box-Muller in double precision, once u is rounded to float32."""
    result = []
    for word in words:
        u = float(np.float32(word >> 32) * np.float32(2**-32) + np.float32(2**-33))
        turns = (word & 0xFFFFFFFF) / 2**32
        radius = math.sqrt(-2 * math.log(u))
        result += [radius * math.cos(2 * math.pi * turns), radius * math.sin(2 * math.pi * turns)]
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("seed, step, stream", [(0, 0, 0), (1, 2, 3), (-1, 49, 0), (1 << 63, 1 << 40, 7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_follows_its_definition(body, shape, seed, step, stream):
    batch, numel = shape[0], math.prod(shape[1:])
    seeds = [seed + i for i in range(batch)]
    z = philox_normal(shape, seeds, step, stream=stream, device=body.device, backend=body.backend)
    assert z.shape == shape and z.dtype == torch.float32 and z.device.type == body.device
    for sample, sample_seed in zip(z.cpu(), seeds, strict=True):
        exact = normals(philox_words(sample_seed, step, stream, (numel + 1) // 2))[:numel]
        torch.testing.assert_close(sample.flatten().double(), exact, rtol=6e-7, atol=1e-14)


def test_words_are_numpys():
    for seed, step, stream in [(3, 0, 0), (-7, 12, 5)]:
        key, counter = [seed & MASK, 0], [0, step, stream, 0]
        generator = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64))
        assert generator.random_raw(11).tolist() == philox_words(seed, step, stream, 11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_float32_rounded(body, dtype):
    shape, seeds = (2, 3, 37, 11), [5, 6]
    z = philox_normal(shape, seeds, device=body.device, backend=body.backend)
    low = philox_normal(shape, seeds, dtype=dtype, device=body.device, backend=body.backend)
    assert torch.equal(low, z.to(dtype))


@pytest.mark.parametrize("shape", [(3, 4, 32, 32), (3, 3, 37, 11), (3, 256)], ids=["even", "odd", "short"])
def test_a_sample_does_not_notice_its_batch(body, shape):
    seeds = [7, -8, 9]
    together = philox_normal(shape, seeds, 3, device=body.device, backend=body.backend)
    for i, seed in enumerate(seeds):
        alone = philox_normal((1, *shape[1:]), [seed], 3, device=body.device, backend=body.backend)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("shape", [(5, 4, 64, 64), (1, 300_001), (3, 140_000)])
def test_threads_and_batches_do_not_change_a_bit(shape):
    """Large enough for several parts of the twin and for threads of torch."""
    seeds, threads = list(range(shape[0])), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(philox_normal(shape, seeds, 3))
    finally:
        torch.set_num_threads(threads)
    alone = torch.cat([philox_normal((1, *shape[1:]), [seed], 3) for seed in seeds])
    assert all(torch.equal(result, alone) for result in results)


def test_a_longer_sample_continues_a_shorter_one():
    long = philox_normal((1, 40_001), [3])
    assert torch.equal(long[0, :1001], philox_normal((1, 1001), [3])[0])


def test_distribution():
    stats = pytest.importorskip("scipy.stats", reason="scipy is a test dependency")
    z = philox_normal((4, 1 << 18), [0, 1, 2, 3]).flatten().double()
    count = z.numel()
    for power, moment, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)]:
        assert abs((z**power).mean().item() - moment) < 4 * math.sqrt(spread / count)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert 4.5 < z.abs().max() < 6.77
    pairs = z.view(-1, 2)
    assert stats.kstest((pairs**2).sum(1).numpy(), "chi2", (2,)).pvalue > 1e-3


def test_seeds_steps_and_streams_are_unrelated():
    size = 1 << 16
    coordinates = [
        (0, 0, 0),
        (1, 0, 0),
        (-1, 0, 0),
        (1 << 62, 0, 0),
        (0, 1, 0),
        (0, 2, 0),
        (0, 0, 1),
        (1, 1, 1),
    ]
    z = torch.stack([philox_normal((1, size), [s], t, stream=u)[0] for s, t, u in coordinates])
    correlation = torch.corrcoef(z) - torch.eye(len(coordinates))
    assert correlation.abs().max() < 5 / math.sqrt(size)
    lagged = torch.corrcoef(torch.stack([z[0, :-1], z[0, 1:], (z[0, :-1] ** 2), (z[0, 1:] ** 2)]))
    assert (lagged - torch.diag(lagged.diag())).abs().max() < 0.02


def test_extreme_words_stay_finite_and_exact():
    """Zero, the quarter turns and their neighbours, at the smallest and the largest radius."""
    from moe_sampler.kernels.noise import box_muller

    lows = [(quarter << 30) + delta & 0xFFFFFFFF for quarter in range(4) for delta in (-1, 0, 1)]
    words = [high << 32 | low for high in (0, 1, 1 << 31, (1 << 32) - 1) for low in lows]
    out = np.empty(2 * len(words), dtype=np.float32)
    box_muller(np.array(words, dtype=np.uint64), out)
    # The reference's own cosine is off by 1e-16 where the result is zero.
    torch.testing.assert_close(torch.from_numpy(out).double(), normals(words), rtol=5e-7, atol=1e-14)
    assert (out[-2 * len(lows) :] == 0).all(), "u = 1"


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    philox_normal((2, 100), [1, 2])
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()


def test_seeds_wrap_modulo_two_to_the_64():
    assert torch.equal(philox_normal((1, 9), [-5]), philox_normal((1, 9), [(1 << 64) - 5]))
    ends = [-(1 << 63), (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # all of 64 bits, with a sign and without
    numbers = philox_normal((4, 9), ends)
    assert torch.equal(numbers[0], numbers[2]) and torch.equal(numbers[3], philox_normal((1, 9), [-1])[0])
    assert not torch.equal(numbers[0], numbers[1])
    assert torch.equal(philox_normal((1, 9), torch.tensor([-5])), philox_normal((1, 9), [-5]))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (((2, 3), [1]), ValueError, "seeds must have shape"),
        (((1, 3), [1 << 64]), ValueError, "a seed must lie in"),
        (((1, 3), [-(1 << 63) - 1]), ValueError, "a seed must lie in"),
        (((1, 3), [1], -1), ValueError, "step must lie in"),
        (((1, 3), torch.tensor([1], dtype=torch.int32)), TypeError, "seeds must be int64"),
        (((), []), ValueError, "batch first"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        philox_normal(*arguments)


def test_wrong_dtype():
    with pytest.raises(TypeError, match="dtype must be float32"):
        philox_normal((1, 3), [1], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (3, 5, 33), (2, 1 << 17), (2, 0)])
def test_several_steps_at_once_are_each_steps_noise(shape):
    seeds, steps = torch.arange(shape[0]) - 1, [0, 3, 7]
    together = normal_of_steps(shape, seeds, steps, stream=2)
    for drawn, step in zip(together, steps, strict=True):
        assert torch.equal(drawn, philox_normal(shape, seeds, step, stream=2))
