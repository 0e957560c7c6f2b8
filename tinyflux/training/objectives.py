"""The student's loss on a batch; `ObjectiveSettings` says what it is made of.

Time t runs from noise (0) to data (1), and the student predicts data - noise; a share of noise is s = 1 - t.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_sampler._transfers import to_device
from moe_sampler.kernels import flow_training_pair, min_snr_weight, philox_normal, weighted_mse
from moe_sampler.tinyflux.model.tinyflux import TinyFlux, TinyFluxOutput
from moe_sampler.tinyflux.training.alignment import Alignment
from moe_sampler.tinyflux.training.objective_settings import ObjectiveSettings, warmed_up
from moe_sampler.tinyflux.training.routed import RoutedTeachers
from moe_sampler.tinyflux.training.teachers import FeatureTeachers, Taught
from moe_sampler.tinyflux.training.time_settings import TimeSettings
from moe_sampler.tinyflux.training.times import sample_noise
from moe_sampler.training.draws import Draws
from moe_sampler.training.task import Losses

__all__ = ["student_loss", "tokens"]

T = TypeVar("T")


def student_loss(
    model: nn.Module,
    student: TinyFlux,
    batch: Mapping[str, Any],
    draws: Draws,
    *,
    objective: ObjectiveSettings,
    time: TimeSettings,
    teachers: FeatureTeachers | None = None,
    routed: RoutedTeachers | None = None,
    alignment: Alignment | None = None,
) -> Losses:
    """The loss of a batch, a mean over all its samples: one without a teacher counts as zero there.

    Args:
        model: `student`, maybe wrapped for several processes or compiled.
        student: the model itself.
        batch: of a cache's items (`FeatureCache`, `MultiSource`), on the draws' device.
        draws: where all random numbers are from, and how far warm-ups are.
        objective: for which `check_objective` found everything there.
        time: how times are drawn.
        teachers: of the features.
        routed: experts whose velocity is distilled.
        alignment: of the student's tokens, for which it was prepared.

    Returns:
        terms: "velocity" and, where they have a weight, "lune", "sol_stats", "sol_map", "distill" and
        "align", before min-SNR and their weights. per_sample: the velocity's.
    """
    config = student.config
    height, width = batch["latents"].shape[2:]
    size = (height, width)
    # Where experts run in the loop it is drawn on the host, which plans their calls, and then brought over.
    planned = routed is not None or (teachers is not None and teachers.planned)
    here = draws.on("cpu") if planned else draws
    noise_here = sample_noise(time, here)
    taught_here = ~_drawn(here, "teacher_dropout", objective.teacher_dropout)
    noise, taught_rows = (to_device(drawn, draws.device) for drawn in (noise_here, taught_here))
    pair = flow_training_pair(
        batch["latents"].contiguous(),
        noise,
        seeds=draws.seeds("noise"),
        prediction="reversed_flow_prediction",
        dtype=torch.float32,
    )
    taught = None
    if teachers is not None:
        taught = _dropped(teachers.features(batch, 1 - noise_here, draws), taught_rows)
    out = model(
        tokens(pair.noisy),
        batch["prompt_embeds"],
        batch["pooled_prompt_embeds"],
        1 - noise,
        size=size,
        encoder_attention_mask=batch.get("prompt_mask"),
        drop_text=_drawn(
            draws,
            "text_dropout",
            config["text_dropout"] if objective.text_dropout is None else objective.text_dropout,
        ),
        **_real_features(config, taught, _drawn(draws, "feature_input", objective.feature_input)),
        **({} if alignment is None else {"align": True}),
        **_dropout(student, draws),
    )
    weight_map = _masked(
        objective.background_weight, batch, size, _weight_map(objective.sol_weight_map, taught)
    )

    def velocity_error(target: Tensor, kind: str) -> Tensor:
        return _error(
            kind, out.sample, tokens(target), objective.huber_delta, weight_map=weight_map, size=size
        )

    velocity = velocity_error(pair.target, objective.velocity_loss)
    per_sample, terms = velocity, {"velocity": velocity}
    if objective.distill_weight:
        weight = objective.distill_weight * here.scheduled(warmed_up, objective.distill_warmup_steps)
        share_here = weight * objective.mix(noise_here) * taught_here
        target = _routed_velocity(_there(routed, "routed"), pair.noisy, noise_here, batch, share_here)
        share = to_device(share_here, draws.device)
        terms["distill"] = velocity_error(target, objective.distill_loss) * (share > 0)
        per_sample = torch.lerp(velocity, terms["distill"], share)
    if objective.min_snr_gamma is not None:
        snr = min_snr_weight(1 - noise, noise, objective.min_snr_gamma, "reversed_flow_prediction")
        per_sample = snr * per_sample
    for name, weight, error in _feature_errors(objective, draws, student, out, taught):
        terms[name] = error
        per_sample = per_sample + weight * error
    if alignment is not None:
        aligned = _there(out.aligned, "a student with a projector")
        terms["align"] = alignment.errors(aligned, size, batch, noise, draws) * taught_rows
        per_sample = per_sample + alignment.weight(draws) * terms["align"]
    means = {name: term.detach().mean() for name, term in terms.items()}
    return Losses(per_sample.mean(), means, velocity.detach(), noise)


def _drawn(draws: Draws, stream: str, rate: float) -> Tensor:
    """bool [B]: each sample with probability `rate`."""
    return draws.uniform(stream) < rate


def tokens(images: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h·w, C]."""
    return images.flatten(2).transpose(1, 2).contiguous()


def _dropped(taught: Taught, rows: Tensor) -> Taught:
    return taught._replace(has_lune=taught.has_lune & rows, has_sol=taught.has_sol & rows)


def _real_features(config: Mapping[str, Any], taught: Taught | None, fed: Tensor) -> dict[str, Tensor]:
    """What the student is given of the experts. Masks are never left out, so that the predictors belong to
    every step's graph, as training in several processes needs."""
    given: dict[str, Tensor] = {}
    if taught is not None and taught.lune is not None and config["use_lune_expert"]:
        given |= {"lune_features": taught.lune, "lune_mask": taught.has_lune & fed}
    sol = None if taught is None or not config["use_sol_prior"] else taught
    if sol is not None and sol.sol_stats is not None and sol.sol_map is not None:
        given |= {"sol_stats": sol.sol_stats, "sol_spatial": sol.sol_map, "sol_mask": sol.has_sol & fed}
    return given


def _dropout(student: TinyFlux, draws: Draws) -> dict[str, Tensor]:
    """Of Lune's predictor, drawn like all else: so several processes drop what one does."""
    config, share = student.config, student.config["lune_dropout"]
    if not student.training or not config["use_lune_expert"] or not share:
        return {}
    normal = philox_normal((len(draws), config["lune_hidden_dim"]), draws.seeds("lune_dropout"))
    if share >= 1:
        return {"lune_kept": torch.zeros_like(normal)}
    return {"lune_kept": (normal >= NormalDist().inv_cdf(share)) / (1 - share)}


def _weight_map(strength: float, taught: Taught | None) -> Tensor | None:
    """[B, S, S] with a mean of 1: Sol's map where there is one, ones elsewhere."""
    if not strength:
        return None
    taught = _there(taught, "teachers")
    found = _there(taught.sol_map, "Sol's maps")
    unit = found / found.mean((1, 2), keepdim=True).clamp_min(1e-12)
    return torch.where(taught.has_sol[:, None, None], 1 + strength * (unit - 1), 1.0)


def _masked(
    background: float, batch: Mapping[str, Any], size: tuple[int, int], weight_map: Tensor | None
) -> Tensor | None:
    """[B, h, w]: `background` outside of the masks and 1 within, scaled to a mean of 1, times what else there
    is."""
    if background == 1:
        return weight_map
    mask = _there(batch.get("loss_mask"), "masks").float() / 255
    own = background + (1 - background) * mask
    own = own / own.mean((1, 2), keepdim=True).clamp_min(1e-6)
    return own if weight_map is None else own * _spread(weight_map, size)


def _spread(weight_map: Tensor, size: tuple[int, int] | None) -> Tensor:
    """[B, h, w] of a map [B, S, S]."""
    return F.interpolate(weight_map[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _routed_velocity(
    routed: RoutedTeachers, noisy: Tensor, noise: Tensor, batch: Mapping[str, Any], share: Tensor
) -> Tensor:
    """[B, C, h, w], zero where the experts have no share: these samples don't run through them.

    noise, share: [B], on the host, where it is decided what runs.
    """
    velocity = torch.zeros_like(noisy)
    rows = [row for row, part in enumerate(share.tolist()) if part > 0]
    if not rows:
        return velocity
    places = to_device(torch.tensor(rows), noisy.device)
    text = {
        "caption": [batch["caption"][row] for row in rows],
        "prompt_embeds": batch["prompt_embeds"][places],
    }
    return velocity.index_copy_(0, places, routed.velocity(noisy[places], noise[rows], text))


def _feature_errors(
    objective: ObjectiveSettings, draws: Draws, student: TinyFlux, out: TinyFluxOutput, taught: Taught | None
) -> list[tuple[str, Tensor, Tensor]]:
    """(name, weight [], error [B]) of every expert feature that is learned."""
    if not (objective.lune_weight or objective.sol_stats_weight or objective.sol_map_weight):
        return []
    found, delta, taught = [], objective.huber_delta, _there(taught, "teachers")
    lune, sol = (
        draws.scheduled(warmed_up, n) for n in (objective.lune_warmup_steps, objective.sol_warmup_steps)
    )
    if objective.lune_weight:
        predicted = _there(out.lune_pred, "a student with use_lune_expert")
        error = _error(objective.lune_loss, predicted, _there(taught.lune, "Lune's features"), delta)
        found.append(("lune", lune * objective.lune_weight, error * taught.has_lune))
    if objective.sol_stats_weight:
        predicted = _there(out.pred_stats, "a student with use_sol_prior")
        error = _error("mse", predicted, _there(taught.sol_stats, "Sol's statistics"), delta)
        found.append(("sol_stats", sol * objective.sol_stats_weight, error * taught.has_sol))
    if objective.sol_map_weight:
        predicted = _there(out.pred_spatial, "a student with use_sol_prior")
        prior = _there(student.sol_prior, "a student with use_sol_prior")
        error = _error("mse", predicted, prior.scaled(_there(taught.sol_map, "Sol's maps")), delta)
        found.append(("sol_map", sol * objective.sol_map_weight, error * taught.has_sol))
    return found


def _there(found: T | None, what: str) -> T:
    if found is None:
        raise ValueError(f"the objective needs {what}: `check_objective` says so before a run")
    return found


def _error(
    kind: str,
    prediction: Tensor,
    target: Tensor,
    delta: float,
    *,
    weight_map: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """float32 [B]: each sample's mean error; of tokens [B, h·w, C] of `size` weighed by a map [B, S, S]."""
    if kind == "mse":
        return weighted_mse(prediction, target, weight_map=weight_map, size=size, reduction="none")
    prediction = prediction.float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1)
    error = F.huber_loss(prediction, target, reduction="none", delta=delta)
    if weight_map is not None:
        error = error * tokens(_spread(weight_map, size)[:, None])
    return error.flatten(1).mean(1)
