"""The two experts: architecture, noise levels and losses of the shared trunk, Sol and Lune.

Trunk and Lune learn the flow velocity u = eps - x0 at x = (1 - s) x0 + s eps; Sol learns v = alpha eps -
sigma x0 on the VP path with linear betas. Sol's flat masses come from its targets: below the noise share
`STRUCTURE_BELOW` it only ever saw structure pictures. Above it, where a hybrid run uses it, it saw the full
ones, so it hands Lune the right distribution.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin

from .._transfers import to_device
from ..architectures import build
from ..expert_training import (
    Captions,
    ExpertSettings,
    ExpertTask,
    LatentImages,
    LevelSettings,
    Objective,
    TextStates,
)
from ..expert_training.captions import StatesTable
from .data import SceneSet
from .text import WIDTH

STRUCTURE_BELOW = 0.65
CAPTION_DROP = 0.1
SOL_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "timestep_spacing": "trailing",
}
LUNE_SCHEDULER = {"num_train_timesteps": 1000, "shift": 2.0}
StageObjective = tuple[str, LevelSettings, float]
"""The kind of expert, its noise levels, and below which s it sees structure pictures."""
OBJECTIVES: Mapping[str, StageObjective] = {
    "trunk": ("lune", LevelSettings(density="uniform"), 0.0),
    "sol": ("sol", LevelSettings(density="shifted", shift=2.0), STRUCTURE_BELOW),
    "lune": ("lune", LevelSettings(density="focus", focus=0.8, focus_share=0.85), 0.0),
}
"""What each stage learns.

Sol's timesteps are spread as a shifted flow density would be: uniform ones would spend a third of the steps
above s = 0.96, where there is nothing to see.
"""


def new_unet(channels: tuple[int, int, int], text_width: int = WIDTH) -> ModelMixin:
    """An untrained expert for 16x16 latents, cross-attending to the text in its two lower levels."""
    return build(
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": channels,
            "layers_per_block": 1,
            "cross_attention_dim": text_width,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        }
    )


def sol_scheduler() -> DDPMScheduler:
    return DDPMScheduler(**SOL_SCHEDULER)


def lune_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**LUNE_SCHEDULER)


def latent_images(name: str, scenes: SceneSet, latents: np.ndarray) -> LatentImages:
    """What stage "trunk", "sol" or "lune" trains on.

    latents: float32 [N, 2, 4, 16, 16], scaled to unit variance: full, structure.
    """
    full, structure = (torch.from_numpy(np.ascontiguousarray(latents[:, i])) for i in (0, 1))
    about = {"kind": "demo scenes", "first": scenes.first, "images": len(scenes)}
    _, _, structure_below = OBJECTIVES[name]
    captions = Captions.of(scenes.words.texts)
    return LatentImages(full, captions, about, structure if structure_below else None)


def expert_task(
    name: str,
    unet: ModelMixin,
    data: LatentImages,
    states: np.ndarray,
    text: TextStates,
    learns: StageObjective | None = None,
) -> ExpertTask:
    """Stage "trunk", "sol" or "lune".

    states: of the data's texts, as `encode_texts` makes them. learns: what, if not as in OBJECTIVES.
    """
    kind, levels, structure_below = OBJECTIVES[name] if learns is None else learns
    settings = ExpertSettings(structure_below=structure_below, caption_dropout=CAPTION_DROP)
    objective = Objective(kind, settings, levels)
    texts = StatesTable(torch.from_numpy(states))
    return ExpertTask(unet, objective, data, text, settings, texts=texts, name=name)


def encode_texts(
    scenes: SceneSet, text: TextStates, batch: int = 64, device: torch.device | str = "cpu"
) -> np.ndarray:
    """float16 [U, tokens, channels]: the states of all different texts, in the order of `Captions.of`."""
    words = scenes.words
    captions = Captions.of(words.texts)
    # The tokens of each text, where it first occurs: they were made with the words.
    rows, places = np.unique(captions.rows.flatten().numpy(), return_index=True)
    empty, _ = text.tokenize([""])
    tokens = empty.repeat(len(captions.texts), 1)
    tokens[rows] = torch.from_numpy(words.tokens).flatten(0, 1)[places].long()
    parts = [
        text.encode(to_device(tokens[i : i + batch], device)).half().cpu()
        for i in range(0, len(tokens), batch)
    ]
    return torch.cat(parts).numpy()
