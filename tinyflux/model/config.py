"""What a TinyFlux is made of: one configuration for published checkpoints and for new models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moe_sampler._readers import parse_json, typed

__all__ = ["TinyFluxConfig"]

_OPTIONS_OF_V4 = {
    "time_factor": 1.0,
    "qk_norm": False,
    "head_temperature": False,
    "unit_mean_map": False,
    "null_condition": "zero",
    "text_dropout": 0.0,
    "sol_qk_scale": True,
    "text_mask": False,
    "schedule": "data",
    "latent_shift": 0.0,
    "sample_size": (64, 64),
    "negative_prompt": "blurry, distorted, low quality",
}
# Settings that upstream's config.json may hold beside the architecture, of its losses.
_UPSTREAMS_OWN = {"lune_distill_mode", "use_huber_loss", "huber_delta"}
# Settings of upstream's, with the values that this architecture has.
_UPSTREAMS_FIXED = {"guidance_embeds": (False,), "t5_pool_mode": ("attention", "mean", "cls")}
"""What upstream calls t5_pool_mode was never read: its models pool by attention whatever it says."""
_NAMES_OF_V3 = {
    "use_expert_predictor": "use_lune_expert",
    "expert_dim": "lune_expert_dim",
    "expert_hidden_dim": "lune_hidden_dim",
    "expert_dropout": "lune_dropout",
}


@dataclass(frozen=True)
class TinyFluxConfig:
    """The defaults are for new models; `deep_v4` describes the published TinyFlux-Deep v4 checkpoints.

    Args:
        hidden_size: D, the width of the token streams: num_attention_heads * attention_head_dim.
        num_attention_heads, attention_head_dim: of every attention layer.
        in_channels: channels of the latents, in and out.
        patch_size: 1, as every latent pixel is a token.
        joint_attention_dim: width of the text tokens (T5's or CLIP's hidden states).
        pooled_projection_dim: width of the pooled text (CLIP's).
        num_double_layers, num_single_layers: blocks with two streams, then blocks with one.
        mlp_ratio: the MLPs' inner width over hidden_size.
        axes_dims_rope: head dimensions that turn with (index, y, x); even, and attention_head_dim in sum.
        use_lune_expert: predict Lune's features, or take the real ones, and add them to the conditioning.
        lune_expert_dim, lune_hidden_dim, lune_dropout: of the features and of their predictor.
        freeze_lune, freeze_sol: leave the predictors out of training.
        use_sol_prior: Sol's attention statistics and map set the attention's temperature and weigh its
            image tokens.
        sol_spatial_size, sol_hidden_dim: side of Sol's map; inner width of its predictors.
        sol_geometric_weight: initial share, 0 to 1, of the part that depends on time alone.
        use_t5_vec: add the pooled text tokens to the conditioning.
        time_factor: the time embedding sees time_factor * t; with 1, t = 0.30 and 0.31 look alike to it.
        qk_norm: RMS-normalise queries and keys of each head.
        head_temperature: every head has Sol's temperature for that head, not the mean of all heads'.
        unit_mean_map: Sol's map, predicted, real or geometric, is scaled to a mean of 1 before blending, and
            the predicted one has it. Without, the three have different scales (about 1/2, 1/64 and 0.6).
        null_condition: what stands for no text, "learned" or "zero".
        text_dropout: share of samples a trainer should show the null condition; see `TinyFlux.forward`.
        sol_qk_scale: hold the two tensors `sol_prior.spatial_to_qk_scale`, which nothing uses, as the
            published checkpoints do.
        text_mask: of what it was trained on, as all that follows, which sampling keeps to: padding of the
            text doesn't count.
        schedule: where a shift crowds the sampler's steps, at "noise" or, as upstream does, at "data".
        latent_scale, latent_shift: of its latents, (encoded - shift) * scale; by default those of its VAE.
        sample_size: (height, width) of its latents.
        negative_prompt: what guidance leads away from where the null condition was never learned; None for
            that condition.
        encoders: where its VAE and text encoders are, as arguments of `StudentEncoders.gather`.

    Raises:
        ValueError: values that contradict each other or are out of range.
    """

    hidden_size: int = 512
    num_attention_heads: int = 4
    attention_head_dim: int = 128
    in_channels: int = 16
    patch_size: int = 1
    joint_attention_dim: int = 768
    pooled_projection_dim: int = 768
    num_double_layers: int = 15
    num_single_layers: int = 25
    mlp_ratio: float = 4.0
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    use_lune_expert: bool = True
    lune_expert_dim: int = 1280
    lune_hidden_dim: int = 512
    lune_dropout: float = 0.1
    freeze_lune: bool = False
    use_sol_prior: bool = True
    sol_spatial_size: int = 8
    sol_hidden_dim: int = 256
    sol_geometric_weight: float = 0.7
    freeze_sol: bool = False
    use_t5_vec: bool = True
    time_factor: float = 1000.0
    qk_norm: bool = True
    head_temperature: bool = True
    unit_mean_map: bool = True
    null_condition: Literal["learned", "zero"] = "learned"
    text_dropout: float = 0.1
    sol_qk_scale: bool = False
    text_mask: bool = True
    schedule: Literal["noise", "data"] = "noise"
    latent_scale: float | None = None
    latent_shift: float | None = None
    sample_size: tuple[int, int] | None = None
    negative_prompt: str | None = None
    encoders: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
        sizes = ("hidden_size", "num_attention_heads", "attention_head_dim", "in_channels")
        sizes += ("joint_attention_dim", "pooled_projection_dim", "lune_expert_dim", "lune_hidden_dim")
        for name in (*sizes, "sol_spatial_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sol_hidden_dim < 2:
            raise ValueError(f"sol_hidden_dim must be at least 2, got {self.sol_hidden_dim}")
        if self.num_double_layers < 0 or self.num_single_layers < 0:
            raise ValueError("num_double_layers and num_single_layers must not be negative")
        if self.hidden_size != self.num_attention_heads * self.attention_head_dim:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be num_attention_heads * attention_head_dim "
                f"({self.num_attention_heads} * {self.attention_head_dim})"
            )
        axes = self.axes_dims_rope
        if sum(axes) != self.attention_head_dim or any(dim < 0 or dim % 2 for dim in axes):
            raise ValueError(
                f"axes_dims_rope must be even and add up to attention_head_dim ({self.attention_head_dim}), "
                f"got {axes}"
            )
        if len(axes) != 3:
            raise ValueError(f"axes_dims_rope has three entries, for index, y and x, got {axes}")
        if self.patch_size != 1:
            raise ValueError(f"patch_size must be 1: a token is a latent pixel, got {self.patch_size}")
        for name in ("sol_geometric_weight", "text_dropout", "lune_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("time_factor", "mlp_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.sample_size is not None:
            object.__setattr__(self, "sample_size", tuple(self.sample_size))
            if len(self.sample_size) != 2 or min(self.sample_size) < 1:
                raise ValueError(f"sample_size is (height, width) of the latents, got {self.sample_size}")
        if self.latent_scale is not None and not 0 < self.latent_scale < math.inf:
            raise ValueError(f"latent_scale must be positive, got {self.latent_scale}")
        if self.schedule not in ("noise", "data"):
            raise ValueError(f'schedule must be "noise" or "data", got {self.schedule!r}')
        if self.null_condition not in ("learned", "zero"):
            raise ValueError(f'null_condition must be "learned" or "zero", got {self.null_condition!r}')

    @classmethod
    def deep_v4(cls, **settings: Any) -> TinyFluxConfig:
        """The published TinyFlux-Deep v4: 245 million parameters, all its behaviour kept. `settings` change
        sizes for checkpoints of other shapes."""
        return cls(**{**_OPTIONS_OF_V4, **settings})

    @classmethod
    def deep(cls, **settings: Any) -> TinyFluxConfig:
        """A new model of the published size."""
        return cls(**settings)

    @classmethod
    def demo(cls, **settings: Any) -> TinyFluxConfig:
        """A new model for the demo experts (4x16x16 latents, 128-wide text): learns in minutes on a CPU."""
        sizes = {
            "hidden_size": 128,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "in_channels": 4,
            "joint_attention_dim": 128,
            "pooled_projection_dim": 128,
            "num_double_layers": 2,
            "num_single_layers": 3,
            "axes_dims_rope": (8, 12, 12),
            "lune_expert_dim": 160,
            "lune_hidden_dim": 128,
            "sol_hidden_dim": 64,
        }
        return cls(**{**sizes, **settings})

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TinyFluxConfig:
        """From a parsed config.json, this package's or upstream's.

        A config without any of this package's options is upstream's, and read as `deep_v4` is.

        Raises:
            ValueError: a key this architecture doesn't have.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        given = {k: v for k, v in config.items() if not k.startswith("_") and k != "auto_map"}
        if not any(option in given for option in _OPTIONS_OF_V4):
            for key, values in _UPSTREAMS_FIXED.items():
                if given.get(key, values[0]) not in values:
                    raise ValueError(
                        f"{key} = {given[key]!r} is not supported: checkpoints need {values[0]!r}"
                    )
            own = {*_UPSTREAMS_OWN, *_UPSTREAMS_FIXED, *_NAMES_OF_V3}
            if "use_expert_predictor" in given and "use_lune_expert" not in given:
                old = {name: given[key] for key, name in _NAMES_OF_V3.items() if key in given}
                given = {"use_sol_prior": False, "use_t5_vec": False, "sol_qk_scale": False, **old, **given}
            given = _OPTIONS_OF_V4 | {key: value for key, value in given.items() if key not in own}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(f"a TinyFlux config has no {', '.join(unknown)}")
        try:
            made = typed(cls, given, "the config")
        except TypeError as error:
            raise ValueError(str(error)) from None
        layers = max(made.num_double_layers, made.num_single_layers)
        if layers > 1000 or max(made.hidden_size, made.in_channels, made.sol_spatial_size) > 10**6:
            raise ValueError("the config describes a model that no machine can hold")
        return made

    @classmethod
    def from_json(cls, text: str) -> TinyFluxConfig:
        config = parse_json(text, "the config", ValueError)
        if not isinstance(config, dict):
            raise ValueError("the config holds no JSON object")
        return cls.from_dict(config)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as config.json holds them."""
        lists = {"axes_dims_rope": list(self.axes_dims_rope)}
        if self.sample_size is not None:
            lists["sample_size"] = list(self.sample_size)
        return dataclasses.asdict(self) | lists

    def replace(self, **settings: Any) -> TinyFluxConfig:
        return dataclasses.replace(self, **settings)
