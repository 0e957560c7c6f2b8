"""Small students with weights that make every part of them count, and something for them to eat."""

from __future__ import annotations

from pathlib import Path

import torch
from typer.testing import CliRunner

from moe_sampler.cli import app
from moe_sampler.tinyflux import TinyFlux, TinyFluxConfig

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "num_double_layers": 2,
    "num_single_layers": 2,
    "axes_dims_rope": (4, 6, 6),
    "lune_expert_dim": 40,
    "lune_hidden_dim": 24,
    "sol_hidden_dim": 16,
}


def new_config(**settings) -> TinyFluxConfig:
    return TinyFluxConfig(**{**SMALL, **settings})


def v4_config(**settings) -> TinyFluxConfig:
    return TinyFluxConfig.deep_v4(**{**SMALL, **settings})


def trained(config: TinyFluxConfig, seed: int = 0) -> TinyFlux:
    """In eval mode, as if training had moved every parameter."""
    torch.manual_seed(seed)
    model = TinyFlux(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs_of(config: TinyFluxConfig, size=(4, 4), batch=2, length=5, real=(), seed=1) -> dict:
    """Keyword arguments of `forward`; `real` names the experts whose real features are among them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(batch, *shape, generator=generator)  # noqa: E731
    found = {
        "hidden_states": draw(size[0] * size[1], config.in_channels),
        "encoder_hidden_states": draw(length, config.joint_attention_dim),
        "pooled_projections": draw(config.pooled_projection_dim),
        "timestep": torch.linspace(0.1, 0.9, batch),
        "size": size,
    }
    if "lune" in real:
        found["lune_features"] = draw(config.lune_expert_dim)
    if "sol" in real:
        side = config.sol_spatial_size
        found["sol_stats"], found["sol_spatial"] = draw(3), draw(side * side).softmax(-1).view(-1, side, side)
    return found


def tables(cache: Path, folder: Path, **changes: dict) -> dict:
    """A short run's settings, as its TOML file has them."""
    found = {
        "training": {
            "output_dir": str(folder),
            "max_train_steps": 4,
            "train_batch_size": 4,
            "lr_warmup_steps": 1,
            "learning_rate": 1e-3,
            "checkpointing_steps": 2,
            "report_to": "none",
        },
        "data": {"caches": [str(cache)], "held_out": 4},
        "model": {"preset": "demo"},
        "validation": {"num_inference_steps": 2, "noise_levels": [0.3, 0.7]},
    }
    for name, values in changes.items():
        found[name] = found.get(name, {}) | values
    return found


def demo_cache(folder: Path, count: int, *flags: str) -> Path:
    """The command's cache of so many scenes as 8×8 latents."""
    words = ["tinyflux", "cache", str(folder), "--demo", "--count", str(count), "--size", "32", *flags]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return folder
