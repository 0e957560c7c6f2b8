"""An independent judge for generated scenes: reads attributes and gives features for distances.

It shares no weights with the text encoder's training: its own network and seed, stronger augmentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_sampler._transfers import OnDevice
from moe_sampler.demo.attributes import HEADS, AttributeReader, augment, group_of, heads_loss, labels
from moe_sampler.demo.autoencoder import to_model
from moe_sampler.demo.data import SceneSet
from moe_sampler.demo.scene_task import SceneLoss, SceneTask, run_stage, stage_settings
from moe_sampler.demo.scenes import Scene
from moe_sampler.demo.weights import fill, trained_steps
from moe_sampler.training.draws import Draws

SETTINGS = stage_settings(6000, 1.5e-3, 48, ema=0.995)
SEED = 77


def new_evaluator() -> AttributeReader:
    """An untrained judge with a fixed initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return AttributeReader(width=96, channels=(32, 64, 96, 96))


def evaluator_loss(model: AttributeReader, scenes: SceneSet) -> SceneLoss:
    """Attributes of full pictures under strong augmentation."""
    pictures = OnDevice(torch.from_numpy(scenes.pictures))
    classes = OnDevice(labels([scenes.scene(i) for i in range(len(scenes))]))

    def loss(which: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        device = which.device
        images = augment(to_model(pictures.on(device)[which, torch.zeros_like(which)]), draws, 1.0)
        value, accuracy = heads_loss(model(images)[1], classes.on(device)[which])
        return value, {"accuracy": accuracy}

    return loss


def train_evaluator(
    scenes: SceneSet, folder: Path, settings: Mapping[str, Any] = SETTINGS
) -> AttributeReader:
    """Train the judge, or continue, or load it when done, from `folder`/evaluator.safetensors."""
    model, path = new_evaluator(), folder / "evaluator.safetensors"
    if trained_steps(path) >= settings["max_train_steps"]:
        fill(model, path)
        return model
    task = SceneTask("evaluator", model, evaluator_loss(model, scenes), len(scenes))
    run_stage(task, folder, SEED, settings)
    return model


@torch.no_grad()
def read(
    model: AttributeReader, images: np.ndarray, batch: int = 100
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Features float64 [N, width] and the predicted class of every head [N], for uint8 [N, 64, 64, 3]."""
    features, classes = [], {head: [] for head in HEADS}
    for i in range(0, len(images), batch):
        part, logits = model(to_model(images[i : i + batch]))
        features.append(part.double().numpy())
        for head, values in logits.items():
            classes[head].append(values.argmax(-1).numpy())
    return np.concatenate(features), {head: np.concatenate(parts) for head, parts in classes.items()}


Tally = dict[str, tuple[int, int]]
"""By head: how often a picture shows what its caption says, and how often captions speak of it."""


def attributes_right(
    classes: dict[str, np.ndarray], scenes: list[Scene], said: list[dict[str, str]]
) -> Tally:
    """The attributes that captions mention, and the kind, in pictures read as `classes`."""
    found: Tally = {}
    for i, scene in enumerate(scenes):
        claims = {"kind": scene.kind, **{f"{scene.kind}.{name}": value for name, value in said[i].items()}}
        for head, value in claims.items():
            right, count = found.get(head, (0, 0))
            found[head] = right + int(HEADS[head][classes[head][i]] == value), count + 1
    return {head: found[head] for head in HEADS if head in found}


def share_right(tally: Tally, group: str | None = None) -> float:
    """0..1 over all heads together, or over those of one of GROUPS; nan where there are none."""
    own = [pair for head, pair in tally.items() if group is None or group_of(head) == group]
    right, count = (sum(column) for column in zip(*own, strict=True)) if own else (0, 0)
    return right / count if count else float("nan")
