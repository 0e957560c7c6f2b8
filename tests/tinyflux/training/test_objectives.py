"""The student's loss, against its parts written out by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from tinyflux_helpers import new_config, trained, v4_config

from moe_sampler.kernels import philox_normal
from moe_sampler.tinyflux.training.objective_settings import ObjectiveSettings, check_objective
from moe_sampler.tinyflux.training.objectives import student_loss
from moe_sampler.tinyflux.training.teachers import Taught
from moe_sampler.tinyflux.training.time_settings import TimeSettings
from moe_sampler.tinyflux.training.times import sample_noise
from moe_sampler.training.draws import Draws
from moe_sampler.training.settings import SettingsError, from_tables, to_tables

TIME = TimeSettings()
PLAIN = {
    "lune_weight": 0.0,
    "sol_stats_weight": 0.0,
    "sol_map_weight": 0.0,
    "teacher_dropout": 0.0,
    "text_dropout": 0.0,
    "feature_input": 0.0,
}
COUNT, SIDE = 4, 8  # the latents are as large as Sol's map, so that its interpolation changes nothing


def plain(**settings) -> ObjectiveSettings:
    return ObjectiveSettings(**{**PLAIN, **settings})


@pytest.fixture(scope="module")
def student():
    return trained(new_config())


@pytest.fixture(scope="module")
def batch() -> dict:
    return batch_of(COUNT)


def batch_of(count: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(count, *shape, generator=generator)  # noqa: E731
    return {
        "latents": draw(4, SIDE, SIDE),
        "prompt_embeds": draw(5, 24),
        "prompt_mask": torch.ones(count, 5, dtype=torch.bool),
        "pooled_prompt_embeds": draw(20),
        "caption": [f"caption {i}" for i in range(count)],
        "lune": draw(40),
        "sol_stats": draw(3).sigmoid(),
        "sol_map": draw(SIDE * SIDE).softmax(-1).view(-1, SIDE, SIDE),
    }


def rows_of(batch: dict, rows: slice) -> dict:
    return {name: value[rows] for name, value in batch.items()}


class Told:
    """Teachers that say what the batch holds, of the samples with these captions or all."""

    teaches = ("sol", "lune")
    planned = False

    def __init__(self, lune=None, sol=None) -> None:
        self.lune, self.sol = lune, sol

    def features(self, batch, t, draws) -> Taught:
        has = [
            torch.tensor([known is None or caption in known for caption in batch["caption"]])
            for known in (self.lune, self.sol)
        ]
        return Taught(batch["lune"], batch["sol_stats"], batch["sol_map"], *has)


class ToldVelocity:
    """Routed experts that say a fixed velocity, and remember whom they were asked about."""

    def __init__(self, velocity: torch.Tensor) -> None:
        self.of, self.asked = velocity, []

    def velocity(self, noisy, noise, batch):
        assert len(noisy) == len(noise) == len(batch["prompt_embeds"]) == len(batch["caption"])
        rows = [int(caption.split()[1]) for caption in batch["caption"]]
        self.asked.append(rows)
        self.saw = noisy, noise
        return self.of[rows]


class Recorder(torch.nn.Module):
    """Calls the student, and keeps what it was called with and what it said."""

    def __init__(self, student) -> None:
        super().__init__()
        self.student, self.calls = student, []

    def forward(self, *args, **kwargs):
        out = self.student(*args, **kwargs)
        self.calls.append((args, kwargs, out))
        return out


def draws_of(count: int = COUNT, places=None, step: int = 10) -> Draws:
    return Draws(7, step, range(count) if places is None else places, count)


def loss_of(student, batch, objective, *, step=10, draws=None, model=None, **teachers):
    teachers = {"teachers": Told(), **teachers}
    return student_loss(
        student if model is None else model,
        student,
        batch,
        draws or draws_of(len(batch["latents"]), step=step),
        objective=objective,
        time=TIME,
        **teachers,
    )


def by_hand(student, batch, step: int = 10) -> tuple:
    """(s, x_t, x0 - noise, output at x_t) without anything real."""
    s = sample_noise(TIME, draws_of(step=step))
    noise = philox_normal(batch["latents"].shape, draws_of(step=step).seeds("noise"))
    level = s.view(-1, 1, 1, 1)
    noisy = (1 - level) * batch["latents"] + level * noise
    out = student(
        noisy.permute(0, 2, 3, 1).reshape(COUNT, SIDE * SIDE, 4),
        batch["prompt_embeds"],
        batch["pooled_prompt_embeds"],
        1 - s,
        encoder_attention_mask=batch["prompt_mask"],
    )
    return s.double(), noisy, (batch["latents"] - noise).double(), out


def image_of(out) -> torch.Tensor:
    return out.sample.view(COUNT, SIDE, SIDE, 4).permute(0, 3, 1, 2).double()


def near(found, expected, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=1e-6)


def huber(error: torch.Tensor, delta: float) -> torch.Tensor:
    return torch.where(error.abs() < delta, error**2 / 2, delta * (error.abs() - delta / 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_velocity_is_the_datas(student, batch, dtype):
    given = batch | {"latents": batch["latents"].to(dtype)}
    s, _, target, out = by_hand(student, given | {"latents": given["latents"].float()})
    losses = loss_of(student, given, plain(), teachers=None)
    error = (image_of(out) - target) ** 2
    near(losses.per_sample, error.mean((1, 2, 3)))
    near(losses.loss, error.mean())
    near(losses.noise, s)
    assert losses.terms.keys() == {"velocity"} and losses.per_sample.dtype == torch.float32
    assert losses.loss.requires_grad
    assert not any(part.requires_grad for part in (*losses.terms.values(), losses.per_sample, losses.noise))


def test_huber(student, batch):
    _, _, target, out = by_hand(student, batch)
    found = loss_of(student, batch, plain(velocity_loss="huber", huber_delta=0.7))
    near(found.per_sample, huber(image_of(out) - target, 0.7).mean((1, 2, 3)))


def test_min_snr_in_its_velocity_form(student, batch):
    """min(SNR, γ) on the error of x0, which is s times the velocity's."""
    s, _, target, out = by_hand(student, batch)
    found = loss_of(student, batch, plain(min_snr_gamma=2.0))
    snr = ((1 - s) / s) ** 2
    weight = snr.clamp(max=2.0) * s**2
    errors = ((image_of(out) - target) ** 2).mean((1, 2, 3))
    near(found.loss, (weight * errors).mean())
    near(found.per_sample, errors)


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_sols_map_weighs_pixels_where_there_is_one(student, batch, kind):
    _, _, target, out = by_hand(student, batch)
    objective = plain(sol_weight_map=0.6, velocity_loss=kind, huber_delta=0.5)
    found = loss_of(student, batch, objective, teachers=Told(sol=["caption 0", "caption 2"]))
    weight = 1 + 0.6 * (batch["sol_map"].double() * SIDE**2 - 1)
    weight[[1, 3]] = 1
    error = image_of(out) - target
    error = error**2 if kind == "mse" else huber(error, 0.5)
    near(found.loss, (weight[:, None] * error).mean())


def test_a_map_of_zeros_is_no_division_by_zero(student, batch):
    """It says that no pixel matters: what is left is the share that it doesn't weigh."""
    empty = {**batch, "sol_map": torch.zeros_like(batch["sol_map"])}
    velocity = loss_of(student, batch, plain()).terms["velocity"]
    found = loss_of(student, empty, plain(sol_weight_map=0.75))
    near(found.loss, 0.25 * velocity)


@pytest.mark.parametrize("kind", ["cosine", "mse", "huber"])
def test_lunes_features(student, batch, kind):
    objective = plain(lune_weight=0.5, lune_loss=kind, huber_delta=0.4, lune_warmup_steps=40)
    found = loss_of(student, batch, objective, step=10)
    _, _, _, out = by_hand(student, batch)
    a, b = out.lune_pred.double(), batch["lune"].double()
    errors = {
        "cosine": 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)),
        "mse": ((a - b) ** 2).mean(1),
        "huber": huber(a - b, 0.4).mean(1),
    }[kind]
    near(found.terms["lune"], errors.mean())
    near(found.loss, found.terms["velocity"] + 0.5 * 10 / 40 * errors.mean())


@pytest.mark.parametrize(("step", "part"), [(0, 0.0), (3, 0.75), (4, 1.0), (5, 1.0), (400, 1.0)])
def test_a_warm_up_ends_at_the_whole_weight(student, batch, step, part):
    """And starts at none of it, for everything that warms up."""
    warm = {f"{name}_warmup_steps": 4 for name in ("lune", "sol", "distill")}
    of_features = {"lune_weight": 0.3, "sol_stats_weight": 0.2, "sol_map_weight": 0.1}
    found = loss_of(student, batch, plain(**of_features, **warm), step=step)
    learned = sum(weight * found.terms[name.removesuffix("_weight")] for name, weight in of_features.items())
    near(found.loss, found.terms["velocity"] + part * learned)
    routed = ToldVelocity(philox_normal(batch["latents"].shape, [9] * COUNT))
    found = loss_of(
        student, batch, plain(distill_weight=0.5, distill_mix="1:1", **warm), step=step, routed=routed
    )
    share = 0.5 * part
    near(found.loss, (1 - share) * found.terms["velocity"] + share * found.terms.get("distill", 0.0))


@pytest.mark.parametrize("unit_mean", [True, False])
def test_sols_statistics_and_map(batch, unit_mean):
    """On the scale the model works in: a mean of 1, or as published checkpoints have it."""
    student = trained(new_config() if unit_mean else v4_config())
    found = loss_of(
        student, batch, plain(sol_stats_weight=0.3, sol_map_weight=0.2, sol_warmup_steps=5), step=5
    )
    _, _, _, out = by_hand(student, batch, step=5)
    maps = batch["sol_map"].double() * (SIDE**2 if unit_mean else 1)
    stats = ((out.pred_stats - batch["sol_stats"]) ** 2).mean()
    spatial = ((out.pred_spatial - maps) ** 2).mean()
    near(found.terms["sol_stats"], stats)
    near(found.terms["sol_map"], spatial)
    near(found.loss, found.terms["velocity"] + 0.3 * stats + 0.2 * spatial)


def test_absent_teachers_count_as_nothing(student, batch):
    objective = plain(lune_weight=1.0, sol_stats_weight=1.0, sol_map_weight=1.0)
    found = loss_of(student, batch, objective, teachers=Told(lune=["caption 1"], sol=["caption 3"]))
    _, _, _, out = by_hand(student, batch)
    lune = 1 - torch.cosine_similarity(out.lune_pred[1], batch["lune"][1], dim=0)
    near(found.terms["lune"], lune / COUNT)
    near(found.terms["sol_stats"], ((out.pred_stats - batch["sol_stats"])[3] ** 2).mean() / COUNT)
    spoiled = batch | {"lune": batch["lune"].clone(), "sol_stats": batch["sol_stats"].clone()}
    spoiled["lune"][[0, 2, 3]], spoiled["sol_stats"][:3] = 50.0, -50.0
    fed = dataclasses.replace(objective, feature_input=1.0)
    same = [
        loss_of(student, b, fed, teachers=Told(lune=["caption 1"], sol=["caption 3"]))
        for b in (batch, spoiled)
    ]
    assert torch.equal(same[0].loss, same[1].loss)


def test_distillation_is_the_mixed_target(student, batch):
    """The gradient is that of the squared error to (1 - share)·data + share·experts."""
    s, noisy, target, _ = by_hand(student, batch)
    velocity = philox_normal(batch["latents"].shape, [9] * COUNT)
    objective = plain(distill_weight=0.8, distill_mix="1:1, 0.2:0.5", distill_warmup_steps=20)
    routed = ToldVelocity(velocity)
    student.zero_grad()
    found = loss_of(student, batch, objective, step=10, routed=routed)
    found.loss.backward()
    gradient = student.final_linear.weight.grad.clone()
    share = 0.8 * 0.5 * torch.from_numpy(np.interp(s.numpy(), [0.2, 1.0], [0.5, 1.0])).view(-1, 1, 1, 1)
    _, _, _, out = by_hand(student, batch)
    mixed = (1 - share) * target + share * velocity
    student.zero_grad()
    ((image_of(out) - mixed) ** 2).mean().backward()
    torch.testing.assert_close(gradient, student.final_linear.weight.grad, rtol=1e-4, atol=1e-6)
    near(found.terms["distill"], ((image_of(out) - velocity) ** 2).mean())
    assert routed.asked == [[0, 1, 2, 3]]
    near(routed.saw[0], noisy)
    near(routed.saw[1], s)
    student.zero_grad()


def test_experts_run_where_they_are_listened_to(student, batch):
    s = sample_noise(TIME, draws_of())
    level = s.sort().values[1:3].mean().item()
    objective = plain(distill_weight=1.0, distill_mix=f"1:1, {level}:1, {level - 1e-6}:0")
    routed = ToldVelocity(torch.zeros_like(batch["latents"]))
    found = loss_of(student, batch, objective, routed=routed)
    assert routed.asked == [[row for row in range(COUNT) if s[row] > level]]
    _, _, target, out = by_hand(student, batch)
    wanted = torch.where((s > level).view(-1, 1, 1, 1), 0.0, target)
    near(found.loss, ((image_of(out) - wanted) ** 2).mean())
    started = dataclasses.replace(objective, distill_warmup_steps=5)
    loss_of(student, batch, started, step=0, routed=routed)
    assert len(routed.asked) == 1


EVERYTHING = {
    "min_snr_gamma": 5.0,
    "sol_weight_map": 0.5,
    "lune_weight": 0.3,
    "sol_stats_weight": 0.2,
    "sol_map_weight": 0.1,
    "distill_weight": 0.4,
    "teacher_dropout": 0.3,
    "text_dropout": 0.3,
    "feature_input": 0.5,
}


def test_micro_batches_of_a_batch_have_its_mean(student):
    count = 12
    batch, objective = batch_of(count), ObjectiveSettings(**EVERYTHING)
    told = {
        "teachers": Told(lune=[f"caption {i}" for i in range(0, count, 2)]),
        "routed": ToldVelocity(philox_normal(batch["latents"].shape, range(count))),
    }
    whole = loss_of(student, batch, objective, draws=draws_of(count), **told)
    parts = [
        loss_of(
            student,
            rows_of(batch, slice(i, i + 4)),
            objective,
            draws=draws_of(count, range(i, i + 4)),
            **told,
        )
        for i in (0, 4, 8)
    ]
    near(torch.stack([p.loss for p in parts]).mean(), whole.loss)
    near(torch.cat([p.per_sample for p in parts]), whole.per_sample)
    for name, term in whole.terms.items():
        near(torch.stack([p.terms[name] for p in parts]).mean(), term)
    assert whole.terms.keys() == {"velocity", "lune", "sol_stats", "sol_map", "distill"}


def test_who_is_dropped_is_each_samples_own_and_each_streams_own(student):
    """The rates, and that text, teachers and feeding have nothing to do with each other."""
    count, rate = 400, 0.3
    one = batch_of(1)
    batch = {
        name: value.expand(count, *value.shape[1:]) if name != "caption" else value * count
        for name, value in one.items()
    } | {"latents": torch.zeros(count, 4, 2, 2)}
    objective = plain(teacher_dropout=rate, text_dropout=rate, feature_input=0.5)
    recorder = Recorder(student)
    with torch.no_grad():
        loss_of(student, batch, objective, model=recorder)
        loss_of(student, batch, dataclasses.replace(objective, teacher_dropout=0.0), model=recorder)
    (_, first, _), (_, second, _) = recorder.calls
    fed, text, would_be_fed = first["lune_mask"], first["drop_text"], second["lune_mask"]
    assert torch.equal(fed, first["sol_mask"]) and torch.equal(text, second["drop_text"])
    assert (fed <= would_be_fed).all()
    kept = fed[would_be_fed].double().mean().item()

    def within(found: float, expected: float, samples: int) -> bool:
        return abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / samples)

    assert within(text.double().mean().item(), rate, count)
    assert within(would_be_fed.double().mean().item(), 0.5, count)
    assert within(kept, 1 - rate, int(would_be_fed.sum()))
    assert within((text & would_be_fed).double().mean().item(), 0.5 * rate, count)


def test_text_dropout_is_the_models_unless_said(batch):
    student = trained(new_config(text_dropout=1.0))
    recorder = Recorder(student)
    loss_of(student, batch, plain(text_dropout=None), model=recorder)
    loss_of(student, batch, plain(text_dropout=0.0), model=recorder)
    assert [kwargs["drop_text"].all().item() for _, kwargs, _ in recorder.calls] == [True, False]


def test_a_dropped_teacher_is_neither_input_nor_target(student, batch):
    objective = plain(**{**EVERYTHING, "teacher_dropout": 1.0, "feature_input": 1.0, "text_dropout": 0.0})
    routed = ToldVelocity(torch.zeros_like(batch["latents"]))
    found = loss_of(student, batch, objective, routed=routed)
    alone = loss_of(student, batch, plain(min_snr_gamma=5.0), teachers=None)
    near(found.loss, alone.loss)
    assert routed.asked == []


def gradient_of(student, names, loss) -> list[bool]:
    student.zero_grad()
    loss.backward()
    parameters = dict(student.named_parameters())
    found = [bool(parameters[name].grad.any()) for name in names]
    student.zero_grad()
    return found


def test_gradients_go_where_they_should(student, batch):
    """Real features teach how to use them, and no loss but its own how to predict them."""
    names = [
        "lune_predictor.predictor.6.weight",
        "lune_predictor.output_proj.1.weight",
        "sol_prior.stat_predictor.4.weight",
        "sol_prior.stat_to_temperature.0.weight",
        "sol_prior.spatial_predictor.4.weight",
    ]
    predicted = loss_of(student, batch, plain())
    assert gradient_of(student, names, predicted.loss) == [True, True, True, True, True]
    fed = loss_of(student, batch, plain(feature_input=1.0))
    assert gradient_of(student, names, fed.loss) == [False, True, False, True, False]
    taught = plain(feature_input=1.0, lune_weight=1.0, sol_stats_weight=1.0, sol_map_weight=1.0)
    assert gradient_of(student, names, loss_of(student, batch, taught).loss) == [True] * 5


def test_every_parameter_belongs_to_the_graph_whatever_is_drawn(student, batch):
    """As training in several processes needs; without masks a fed student's predictors would not."""
    fed = plain(feature_input=1.0)
    student.zero_grad()
    loss_of(student, batch, fed).loss.backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []
    student.zero_grad()


def test_a_student_without_experts(batch):
    student = trained(new_config(use_lune_expert=False, use_sol_prior=False))
    _, _, target, out = by_hand(student, batch)
    found = loss_of(student, batch, plain(feature_input=1.0))
    near(found.loss, ((image_of(out) - target) ** 2).mean())


@pytest.mark.parametrize(
    ("settings", "config", "have", "message"),
    [
        ({"lune_weight": 1.0}, {}, {"teaches": ("sol",)}, "lune_weight.*nothing gives Lune"),
        ({"sol_map_weight": 1.0}, {}, {"teaches": ("lune",)}, "sol_map_weight.*nothing gives Sol"),
        ({"sol_weight_map": 1.0}, {}, {}, "sol_weight_map"),
        ({"sol_stats_weight": 1.0}, {"freeze_sol": True}, {"teaches": ("sol",)}, "freeze_sol"),
        ({"lune_weight": 1.0}, {"use_lune_expert": False}, {"teaches": ("lune",)}, "use_lune_expert"),
        ({"distill_weight": 0.5}, {}, {"teaches": ("sol", "lune")}, "distill_weight"),
    ],
)
def test_losses_without_their_teachers_are_refused(settings, config, have, message):
    with pytest.raises(SettingsError, match=message):
        check_objective(plain(**settings), new_config(**config), **have)
    check_objective(plain(), new_config(**config), **have)
    check_objective(ObjectiveSettings(**EVERYTHING), new_config(), ("sol", "lune"), routed=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"huber_delta": 0.0}, "huber_delta"),
        ({"min_snr_gamma": -1.0}, "min_snr_gamma"),
        ({"lune_weight": -0.1}, "lune_weight"),
        ({"sol_warmup_steps": -1}, "sol_warmup_steps"),
        ({"teacher_dropout": 1.5}, "teacher_dropout"),
        ({"distill_weight": 2.0}, "distill_weight"),
        ({"distill_mix": "0.5:2"}, "distill_mix"),
        ({"distill_mix": "half"}, "distill_mix"),
        ({"distill_handoff_start": 0.3, "distill_handoff_end": 0.6}, "distill_handoff"),
        ({"lune_loss": "l1"}, "cosine, mse, huber"),
        ({"lune_wieght": 1.0}, 'did you mean "lune_weight"'),
    ],
)
def test_objectives_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        from_tables(ObjectiveSettings, settings)


def test_settings_survive_a_file():
    objective = ObjectiveSettings(**EVERYTHING)
    assert from_tables(ObjectiveSettings, to_tables(objective)) == objective


def test_the_router_is_a_boundary_or_a_crossfade():
    soft = ObjectiveSettings(distill_handoff_start=0.8, distill_handoff_end=0.6).router()
    hard = ObjectiveSettings(distill_handoff_start=0.7, distill_handoff_end=0.7).router()
    assert soft(0.81) == hard(0.71) == {"sol": 1.0} and soft(0.59) == hard(0.69) == {"lune": 1.0}
    assert 0 < soft(0.7)["sol"] < 1


def test_dropout_of_lunes_predictor_is_drawn_by_place(batch):
    """So two processes drop what one does, which torch's own generators would not."""
    student = trained(new_config(lune_dropout=0.5)).train()
    told = {"objective": plain(), "time": TIME, "teachers": Told()}

    def errors(places: range) -> torch.Tensor:
        rows = rows_of(batch, slice(places.start, places.stop))
        return student_loss(student, student, rows, draws_of(places=places), **told).per_sample

    whole = errors(range(COUNT))
    torch.testing.assert_close(torch.cat([errors(range(2)), errors(range(2, COUNT))]), whole)
    recorder = Recorder(student)
    student_loss(recorder, student, batch, draws_of(), **told)
    kept = recorder.calls[0][1]["lune_kept"]
    assert kept.unique().tolist() == [0.0, 2.0] and 0.3 < (kept == 0).float().mean() < 0.7
    student.eval()
    student_loss(recorder, student, batch, draws_of(), **told)
    assert "lune_kept" not in recorder.calls[1][1]


@pytest.mark.parametrize("kind", ["mse", "huber"])
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_masks_weigh_the_pixels(student, batch, kind, strength):
    """0.25 outside, 1 within, scaled to a mean of 1, times Sol's map where that weighs too."""
    mask = torch.zeros(COUNT, SIDE, SIDE, dtype=torch.uint8)
    mask[:, :3] = 255
    mask[1] = 255
    mask[2, 5] = 51
    more = {"velocity_loss": kind, "background_weight": 0.25, "sol_weight_map": strength}
    found = loss_of(student, {**batch, "loss_mask": mask}, plain(**more))
    _, _, velocity, out = by_hand(student, batch)
    error = image_of(out) - velocity
    if kind == "huber":
        size = error.abs()
        error = torch.where(size < 0.1, size**2 / 2, 0.1 * (size - 0.05))
    else:
        error = error**2
    weight = 0.25 + 0.75 * mask.double() / 255
    weight = weight / weight.mean((1, 2), keepdim=True)
    sol = batch["sol_map"].double() / batch["sol_map"].double().mean((1, 2), keepdim=True)
    weight = weight * (1 + strength * (sol - 1))
    near(found.per_sample, (error * weight[:, None]).mean((1, 2, 3)), 1e-4)
    whole = loss_of(student, batch, plain(velocity_loss=kind, sol_weight_map=strength))
    near(found.per_sample[1], whole.per_sample[1], 1e-5)  # all of it counts


def test_masks_that_are_not_there(student):
    objective = plain(background_weight=0.5)
    with pytest.raises(SettingsError, match=r"background_weight is 0\.5, but the caches have no masks"):
        check_objective(objective, student.config, ("sol", "lune"))
    check_objective(objective, student.config, ("sol", "lune"), masks=True)
