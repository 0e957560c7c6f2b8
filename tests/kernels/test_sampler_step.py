"""`sampler_step_` against solver steps written out in float64 from their papers' formulas."""

import math

import pytest
import torch
from kernel_helpers import DTYPES, SHAPES, randn
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_sampler.kernels import COLUMNS, make_row, philox_normal, sampler_step_

EVEN, ODD = (2, 4, 32, 32), (3, 3, 37, 11)


def table_of(body, *rows):
    return torch.tensor(rows, dtype=torch.float32, device=body.device)


def on(body, *tensors):
    """Copies on the body's device, so that what is written cannot reach the reference's inputs."""
    return tuple(None if t is None else t.clone().to(body.device) for t in tensors)


def level(timestep, beta_start=1e-4, beta_end=0.02):
    """(α, σ) of DDPM's linear schedule with 1000 timesteps."""
    alpha_bar = 1.0
    for i in range(timestep + 1):
        alpha_bar *= 1 - (beta_start + (beta_end - beta_start) * i / 999)
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


# Each step below is a function of its tensors alone: in float64 it is the reference, in the models' dtype it
# is the eager computation that the tolerance rule compares with.


def ddim_epsilon(x, epsilon, here, there):
    (alpha, sigma), (alpha_next, sigma_next) = here, there
    x0 = (x - sigma * epsilon) / alpha
    return alpha_next * x0 + sigma_next * epsilon


def guided(output, scale):
    uncond, cond = output.chunk(2)
    return uncond + scale * (cond - uncond)


def ddpm_velocity(x, velocity, z, here, there, clip):
    """Ho et al. 2020, posterior mean and variance of q(x_{t-1} | x_t, x0), in ᾱ notation."""
    (alpha, sigma), (alpha_next, sigma_next) = here, there
    x0 = (alpha * x - sigma * velocity).clamp(-clip, clip)
    step_alpha = (alpha / alpha_next) ** 2
    mean = (
        alpha_next * (1 - step_alpha) / sigma**2 * x0 + math.sqrt(step_alpha) * sigma_next**2 / sigma**2 * x
    )
    return mean + math.sqrt(sigma_next**2 / sigma**2 * (1 - step_alpha)) * z


def ddpm_row(here, there, clip, scale):
    """The same posterior as a row: DESIGN's x' = α'·x0 + √(σ'² − n²)·ε̂ + n·z."""
    (alpha, sigma), (alpha_next, sigma_next) = here, there
    n = math.sqrt(sigma_next**2 / sigma**2 * (1 - (alpha / alpha_next) ** 2))
    along = math.sqrt(sigma_next**2 - n**2) / sigma
    a, b = along, alpha_next - along * alpha
    return make_row(
        p=alpha, a=a, b=b, n=n, clip=clip, q_cond_0=-sigma * scale, q_uncond_0=-sigma * (1 - scale)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_unguided_ddim_step_of_a_noise_predictor(body, generator, assert_within_rule, shape, dtype):
    x, epsilon = randn(generator, *shape), randn(generator, *shape, dtype=dtype)
    here, there = level(600), level(550)
    (alpha, sigma), (alpha_next, sigma_next) = here, there
    row = make_row(
        p=1 / alpha,
        q_cond_0=-sigma / alpha,
        a=sigma_next / sigma,
        b=alpha_next - sigma_next * alpha / sigma,
    )
    state, output = on(body, x, epsilon)
    result = sampler_step_(state, [output], table_of(body, row), 0, backend=body.backend)
    assert result is state
    reference = ddim_epsilon(x.double(), epsilon.double(), here, there)
    assert_within_rule(result, ddim_epsilon(x.to(dtype), epsilon, here, there), reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_guided_euler_step_writes_the_next_input_twice(body, generator, assert_within_rule, shape, dtype):
    x, output = randn(generator, *shape), randn(generator, 2 * shape[0], *shape[1:], dtype=dtype)
    s, s_next, scale, next_scale = 0.7, 0.62, 4.5, 1.31

    def euler(x, output):
        return x - guided(output, scale) * (s - s_next)

    b = (s_next - s) / s  # x' = x − u·(s − s') in terms of x and x0 = x − s·u
    row = make_row(
        p=1, q_cond_0=-s * scale, q_uncond_0=-s * (1 - scale), a=1 + b, b=-b, scale_0=next_scale, scale_1=1
    )
    state, model_output = on(body, x, output)
    next_0 = torch.full_like(model_output, torch.nan)
    next_1 = torch.full_like(state, torch.nan, dtype=torch.float16)
    table = table_of(body, make_row(), row)
    sampler_step_(state, [model_output], table, 1, next_inputs=[next_0, next_1], backend=body.backend)
    reference = euler(x.double(), output.double())
    assert_within_rule(state, euler(x.to(dtype), output), reference)
    eager_next = (euler(x.to(dtype), output) * next_scale).to(dtype)
    assert_within_rule(next_0[: shape[0]], eager_next, reference * next_scale)
    assert torch.equal(next_0[: shape[0]], next_0[shape[0] :])
    assert torch.equal(next_1, state.to(torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", ["seeds", "noise"])
@pytest.mark.parametrize("shape", [EVEN, ODD], ids=["even", "odd"])
def test_ancestral_step_with_clipping(body, generator, assert_within_rule, shape, source, dtype):
    x, velocity = randn(generator, *shape), randn(generator, 2 * shape[0], *shape[1:], dtype=dtype)
    seeds = torch.arange(shape[0]) * 7919 - 3
    step, stream, scale, clip = 2, 5, 3.0, 1.0
    here, there = level(700), level(650)
    z = philox_normal(shape, seeds, step, stream=stream)
    table = table_of(body, make_row(), make_row(), ddpm_row(here, there, clip, scale))
    state, output, noise, seeds = on(body, x, velocity, z, seeds)
    given = {"seeds": seeds, "stream": stream} if source == "seeds" else {"noise": noise}
    sampler_step_(state, [output], table, step, **given, backend=body.backend)

    reference = ddpm_velocity(x.double(), guided(velocity.double(), scale), z.double(), here, there, clip)
    eager = ddpm_velocity(x.to(dtype), guided(velocity, scale), z.to(dtype), here, there, clip)
    assert_within_rule(state, eager, reference)
    unclipped = ddpm_velocity(x.double(), guided(velocity.double(), scale), z.double(), here, there, math.inf)
    assert (reference - unclipped).abs().max() > 0.1, "the clip must matter here"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [EVEN, ODD], ids=["even", "odd"])
def test_multistep_history(body, generator, assert_within_rule, shape, dtype):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: a first-order step, then one with history."""
    levels = [level(t) for t in (700, 620, 500)]
    lambdas = [math.log(alpha / sigma) for alpha, sigma in levels]
    x, outputs = randn(generator, *shape), [randn(generator, *shape, dtype=dtype) for _ in range(2)]

    def solve(x, outputs):
        previous = None
        for i, output in enumerate(outputs):
            (alpha, sigma), (alpha_next, sigma_next) = levels[i], levels[i + 1]
            x0 = (x - sigma * output) / alpha
            h = lambdas[i + 1] - lambdas[i]
            slope = x0
            if previous is not None:
                r = (lambdas[i] - lambdas[i - 1]) / h
                slope = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
            x, previous = sigma_next / sigma * x - alpha_next * math.expm1(-h) * slope, x0
        return x, previous

    rows = []
    for i in range(2):
        (alpha, sigma), (alpha_next, sigma_next) = levels[i], levels[i + 1]
        h = lambdas[i + 1] - lambdas[i]
        weight = -alpha_next * math.expm1(-h)
        half = h / (2 * (lambdas[i] - lambdas[i - 1])) if i else 0.0
        rows.append(
            make_row(
                p=1 / alpha,
                q_cond_0=-sigma / alpha,
                a=sigma_next / sigma,
                b=weight * (1 + half),
                d_0=-weight * half,
                keep_x0=1,
            )
        )
    state, *device_outputs = on(body, x, *outputs)
    history = torch.full_like(state, torch.nan)  # unread while d = 0
    for i, output in enumerate(device_outputs):
        sampler_step_(state, [output], table_of(body, *rows), i, memories=[history], backend=body.backend)
    reference, reference_x0 = solve(x.double(), [o.double() for o in outputs])
    eager, eager_x0 = solve(x.to(dtype), outputs)
    assert_within_rule(state, eager, reference)
    assert_within_rule(history, eager_x0, reference_x0)


@pytest.mark.parametrize("dtypes", [DTYPES[:2], DTYPES[1:], DTYPES[::2]], ids=str)
@pytest.mark.parametrize("shape", [EVEN, ODD], ids=["even", "odd"])
def test_two_experts_on_different_paths(body, generator, assert_within_rule, shape, dtypes):
    """A guided velocity expert on the VP path mixed with a plain one on the flow path, 30 to 70."""
    s, s_next, share, scale = 0.6, 0.5, 0.3, 2.0
    total = math.hypot(1 - s, s)
    alpha, sigma = (1 - s) / total, s / total
    x = randn(generator, *shape)
    v = randn(generator, 2 * shape[0], *shape[1:], dtype=dtypes[0])
    u = randn(generator, *shape, dtype=dtypes[1])

    def mixed(x, v, u):
        x0_vp = alpha * (x / total) - sigma * guided(v, scale)
        x0 = share * x0_vp + (1 - share) * (x - s * u)
        noise = (x - (1 - s) * x0) / s
        return (1 - s_next) * x0 + s_next * noise

    row = make_row(
        p=share * alpha / total + 1 - share,
        q_cond_0=-share * sigma * scale,
        q_uncond_0=-share * sigma * (1 - scale),
        q_cond_1=-(1 - share) * s,
        a=s_next / s,
        b=(1 - s_next) - s_next * (1 - s) / s,
    )
    state, *outputs = on(body, x, v, u)
    sampler_step_(state, outputs, table_of(body, row), 0, backend=body.backend)
    low = dtypes[0] if dtypes[0] != torch.float32 else dtypes[1]
    eager = mixed(x.to(low), v.to(low), u.to(low))
    assert_within_rule(state, eager, mixed(x.double(), v.double(), u.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", ["seeds", "noise"])
@pytest.mark.parametrize(("count", "shape"), [(1, EVEN), (2, ODD), (3, EVEN)])
def test_every_column_of_a_row(body, generator, assert_within_rule, count, shape, source, dtype):
    """Four experts, of which two are guided; up to three memories, of which the last is written over."""
    x, memories = randn(generator, *shape), [randn(generator, *shape) for _ in range(count)]
    guided_ones = (True, False, False, True)
    outputs = [randn(generator, (1 + own) * shape[0], *shape[1:], dtype=dtype) for own in guided_ones]
    numbers = torch.randn(len(COLUMNS), generator=generator, dtype=torch.float64).tolist()
    row = dict(zip(COLUMNS, numbers, strict=True)) | {"clip": 1.5}
    row |= {f"d_{age}": 0.0 for age in range(count, 3)}
    seeds = torch.tensor([3, 1 << 40, -5][: shape[0]])
    z = philox_normal(shape, seeds, 1)

    def solve(x, outputs, memories, z):
        x0 = row["p"] * x
        for slot, (output, own) in enumerate(zip(outputs, guided_ones, strict=True)):
            uncond, cond = output.chunk(2) if own else (0.0, output)
            x0 = x0 + row[f"q_cond_{slot}"] * cond + row[f"q_uncond_{slot}"] * uncond
        x0 = x0.clamp(-1.5, 1.5)
        kept = row["keep_x"] * x + row["keep_x0"] * x0 + row["keep_n"] * z
        x = row["a"] * x + row["b"] * x0 + row["n"] * z
        return x + sum(row[f"d_{age}"] * memory for age, memory in enumerate(memories)), kept, x0

    state, noise, seeds, *outputs_there = on(body, x, z, seeds, *outputs)
    memories_there = list(on(body, *memories))
    x0 = torch.full_like(state, torch.nan)
    nexts = [torch.full_like(state, torch.nan, dtype=dtype) for _ in range(4)]
    table = table_of(body, make_row(), make_row(**row))
    given = {"seeds": seeds} if source == "seeds" else {"noise": noise}
    sampler_step_(
        *(state, outputs_there, table, 1),
        **{"memories": memories_there, "x0": x0, "next_inputs": nexts, "backend": body.backend, **given},
    )
    reference = solve(x.double(), [o.double() for o in outputs], [m.double() for m in memories], z.double())
    eager = solve(x.to(dtype), outputs, [m.to(dtype) for m in memories], z.to(dtype))
    for found, low, right in zip((state, memories_there[-1], x0), eager, reference, strict=True):
        assert_within_rule(found, low, right, 3e-6)
    for memory, before in zip(memories_there[:-1], memories, strict=False):
        assert torch.equal(memory.cpu(), before), "only the last one is written"
    for slot, buffer in enumerate(nexts):
        assert_within_rule(
            buffer, (eager[0] * row[f"scale_{slot}"]).to(dtype), reference[0] * row[f"scale_{slot}"], 3e-6
        )


def test_memories_that_a_row_does_not_name_are_left_alone(body, generator):
    x, output = randn(generator, *ODD), randn(generator, *ODD)
    table = table_of(body, make_row(p=1, a=0.5, b=0.5, q_cond_0=-0.5))
    state, same, device_output, *memories = on(body, x, x, output, *[torch.full(ODD, torch.nan)] * 3)
    sampler_step_(state, [device_output], table, 0, memories=memories, backend=body.backend)
    sampler_step_(same, [device_output], table, 0, backend=body.backend)
    torch.testing.assert_close(state, same, rtol=0, atol=0)
    assert all(memory.isnan().all() for memory in memories)


@pytest.mark.parametrize("shape", [EVEN, ODD, (3, 7)], ids=["even", "odd", "tiny"])
def test_a_sample_does_not_notice_its_batch(body, generator, shape):
    x, output = randn(generator, *shape[:1], *shape[1:]), randn(generator, 2 * shape[0], *shape[1:])
    batch, seeds = shape[0], torch.arange(shape[0]) + 11
    table = table_of(body, make_row(p=1.1, a=0.9, b=0.2, n=0.3, q_cond_0=-2.0, q_uncond_0=1.5))
    state, device_output, device_seeds = on(body, x, output, seeds)
    sampler_step_(state, [device_output], table, 0, seeds=device_seeds, backend=body.backend)
    for i in range(batch):
        alone, mine, seed = on(body, x[i : i + 1], output[[i, batch + i]], seeds[i : i + 1])
        sampler_step_(alone, [mine], table, 0, seeds=seed, backend=body.backend)
        assert torch.equal(alone[0], state[i])


@pytest.mark.parametrize("change", [2.0**-k for k in (3, 11, 13, 17, 20, 22)] + [-(2.0**-13), -(2.0**-21)])
def test_a_small_change_of_the_state_is_made(body, generator, change):
    """A row whose x0 is x, so that x grows by a share; a run of many steps is made of such."""
    x = randn(generator, *ODD)
    table = table_of(body, make_row(p=1.0, a=1.0, b=change))
    (state,) = on(body, x)
    sampler_step_(state, [torch.zeros_like(state)], table, 0, backend=body.backend)
    torch.testing.assert_close(state.cpu().double(), x.double() * (1 + change), rtol=2.0**-23, atol=0)


def test_noise_is_untouched_where_the_row_adds_none(body, generator):
    x, output = randn(generator, *ODD), randn(generator, *ODD)
    table = table_of(body, make_row(p=1, a=0.5, b=0.5, q_cond_0=-0.5))
    state, same, device_output, noise = on(body, x, x, output, torch.full(ODD, torch.nan))
    sampler_step_(state, [device_output], table, 0, noise=noise, backend=body.backend)
    sampler_step_(same, [device_output], table, 0, seeds=on(body, torch.arange(3))[0], backend=body.backend)
    assert torch.isfinite(state).all()
    assert torch.equal(state, same)


def test_nan_from_a_model_stays_visible(body, generator):
    for clip in (math.inf, 1.0):
        x, output = randn(generator, *ODD), randn(generator, *ODD)
        output[1, 2, 3, 4] = torch.nan
        state, device_output = on(body, x, output)
        history = torch.zeros_like(state)
        table = table_of(body, make_row(p=1, a=0.5, b=0.5, q_cond_0=-0.5, clip=clip, keep_x0=1))
        sampler_step_(state, [device_output], table, 0, memories=[history], backend=body.backend)
        assert torch.equal(state.isnan().cpu(), output.isnan())
        assert torch.equal(history.isnan().cpu(), output.isnan())


@pytest.mark.parametrize("kind", [torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [EVEN, ODD, (3, 7)], ids=["even", "odd", "tiny"])
def test_a_position_on_the_device_takes_the_rows_in_turn(body, generator, shape, kind):
    """Five identical launches are the five numbered ones, and the model is told each row's timestep."""
    clocks = [901.0, 640.0, 333.0, 20.0, 7.0] if kind == torch.int64 else [0.9, 0.7, 0.5, 0.25, 0.1]
    rows = [
        make_row(p=1.1, a=0.9, b=0.1 * i, n=0.3 * (i % 2), d_0=0.2, keep_x0=i != 2, q_cond_0=-1.0, scale_0=i)
        for i in range(len(clocks))
    ]
    x, output = randn(generator, *shape), randn(generator, *shape)

    def state():
        return on(body, x, torch.zeros_like(x), torch.zeros_like(x), torch.arange(shape[0]) + 5)

    table, (device_output,) = table_of(body, *rows), on(body, output)
    numbered, moving = state(), state()
    device = {"device": body.device}
    position, timesteps = torch.zeros(2, dtype=torch.int32, **device), torch.tensor(clocks, **device)
    told, flags = torch.zeros((), dtype=kind, **device), torch.zeros(len(rows), dtype=torch.int32, **device)
    for i in range(len(rows)):
        for (state, memory, following, seeds), given in (
            (numbered, {"step": i}),
            (
                moving,
                {"step": 0, "position": position, "timesteps": timesteps, "next_timestep": told}
                | {"nonfinite": flags},
            ),
        ):
            sampler_step_(
                state,
                [device_output],
                table,
                memories=[memory],
                next_inputs=[following],
                seeds=seeds,
                backend=body.backend,
                **given,
            )
        assert all(torch.equal(a, b) for a, b in zip(numbered, moving, strict=True)), i
        assert position.tolist() == [i + 1, 0]
        assert told == torch.tensor(clocks[min(i + 1, len(rows) - 1)]).to(kind)
    assert not flags.any()


def test_a_position_finds_its_noise_and_flags_its_row(body):
    x, seeds = on(body, torch.zeros(EVEN), torch.tensor([3, 4]))
    table = table_of(body, *[make_row(a=1.0, n=1.0)] * 3)
    position = torch.tensor([2, 0], dtype=torch.int32, device=body.device)
    flags = torch.zeros(3, dtype=torch.int32, device=body.device)
    x[0, 0, 0, 0] = torch.inf
    sampler_step_(
        x, [x.clone()], table, 0, seeds=seeds, nonfinite=flags, position=position, backend=body.backend
    )
    z = philox_normal(EVEN, seeds, 2, backend=body.backend)
    assert torch.equal(x.flatten()[1:], z.flatten()[1:]) and flags.tolist() == [0, 0, 1]


def test_an_empty_batch_is_nothing_to_do(body):
    state = torch.empty(0, 4, 8, 8, device=body.device)
    table = table_of(body, make_row(p=1, a=1))
    assert sampler_step_(state, [torch.empty_like(state)], table, 0, backend=body.backend) is state


def test_observed_or_not_a_step_is_the_same_and_one_operator(generator, recorded):
    row = make_row(p=0.9, a=0.8, b=0.2, n=0.1, q_cond_0=-0.4, q_uncond_0=0.1, scale_0=1.0)
    x, output = randn(generator, 2, 3, 5), randn(generator, 4, 3, 5)
    table, buffer, seeds = torch.tensor([row]), torch.empty(4, 3, 5), torch.tensor([3, 4])
    plain = x.clone()
    sampler_step_(plain, [output], table, 0, next_inputs=[buffer], seeds=seeds)
    expected = buffer.clone()
    with recorded() as seen:
        watched = sampler_step_(x, [output], table, 0, next_inputs=[buffer.zero_()], seeds=seeds)
    assert seen.names[-1] == "moe_sampler::sampler_step_" and len(seen.names) == 2  # and zero_
    assert torch.equal(watched, plain) and torch.equal(buffer, expected)
    with FakeTensorMode() as mode:
        faked = [mode.from_tensor(tensor) for tensor in (x, output, table)]
        assert (
            sampler_step_(faked[0], faked[1:2], faked[2], 0, seeds=mode.from_tensor(seeds)).shape == x.shape
        )


def test_twin_with_and_without_x0_agrees(generator):
    """Folding the coefficients is an optimisation of the twin: it must not change the step."""
    x, output = randn(generator, *EVEN), randn(generator, *EVEN)
    table = torch.tensor([make_row(p=1.7, a=0.4, b=0.6, q_cond_0=-0.9)])
    folded = sampler_step_(x.clone(), [output], table, 0)
    kept = sampler_step_(x.clone(), [output], table, 0, x0=torch.zeros_like(x))
    torch.testing.assert_close(folded, kept, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [EVEN, ODD], ids=str)
def test_a_step_that_leaves_nan_or_an_infinity_is_flagged(body, generator, shape, value):
    """Wherever it is, once or everywhere; a step that stays finite writes nothing."""
    x, output = randn(generator, *shape), randn(generator, *shape)
    table = table_of(body, *[make_row(p=1.0, q_cond_0=-0.5, a=0.5, b=0.5)] * 4)
    (flags,) = on(body, torch.tensor([0, 0, 0, 7], dtype=torch.int32))
    numel = x.numel()
    places = [[], [0], [numel - 1], [numel // 2, numel // 3]]
    for step, bad in enumerate(places):
        state, prediction = on(body, x, output)
        prediction.view(-1)[bad] = value
        before = flags.clone()
        sampler_step_(state, [prediction], table, step % 3, nonfinite=flags, backend=body.backend)
        if bad:
            before[step % 3] = 1
        assert flags.tolist() == before.tolist(), (step, bad)
    assert flags.tolist() == [1, 1, 1, 7]
    state, prediction = on(body, torch.full(shape, 1e38), output)
    everywhere = torch.full_like(prediction, value)
    sampler_step_(state, [everywhere], table, 3, nonfinite=flags, backend=body.backend)
    assert flags.tolist() == [1, 1, 1, 1]
