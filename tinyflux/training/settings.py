"""All settings of a student's training, by the tables of a TOML file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from moe_sampler.data.captions import check_text
from moe_sampler.loading.presets import PRESETS, preset
from moe_sampler.pipelines.choices import any_of
from moe_sampler.tinyflux.training.alignment_settings import AlignmentSettings
from moe_sampler.tinyflux.training.lora_settings import LoraSettings
from moe_sampler.tinyflux.training.objective_settings import ObjectiveSettings
from moe_sampler.tinyflux.training.time_settings import TimeSettings
from moe_sampler.training import SettingsError, TrainingSettings

__all__ = ["DataSettings", "ModelSettings", "StudentSettings", "TeacherSettings", "ValidationSettings"]


@dataclass(frozen=True)
class ModelSettings:
    """The student that is trained."""

    preset: Annotated[
        Literal["demo", "deep", "deep_v4"],
        "A new student of this TinyFluxConfig: the demo's size, the published size, or the published model",
    ] = "deep"
    init_from: Annotated[
        str | None, "Instead: continue a student; a folder, hub id, .safetensors or trainer's .pt"
    ] = None
    qk_norm: Annotated[bool | None, "Normalise queries and keys. Default: the preset's"] = None
    lune_dropout: Annotated[float | None, "Dropout of Lune's predictor. Default: the preset's"] = None
    use_lune_expert: Annotated[bool | None, "Whether the student takes Lune's features"] = None
    use_sol_prior: Annotated[bool | None, "Whether the student takes Sol's statistics and map"] = None
    hidden_size: Annotated[
        int | None, "Width of the token streams: heads times their width. Default: the preset's"
    ] = None
    num_attention_heads: Annotated[int | None, "Heads of every attention. Default: the preset's"] = None
    attention_head_dim: Annotated[int | None, "Width of a head. Default: the preset's"] = None
    axes_dims_rope: Annotated[
        tuple[int, ...],
        "Parts of a head's width that turn with index, y, x. Default: 1/8, 7/16, 7/16",
    ] = ()
    num_double_layers: Annotated[int | None, "Blocks with two streams. Default: the preset's"] = None
    num_single_layers: Annotated[int | None, "Blocks with one stream. Default: the preset's"] = None
    mlp_ratio: Annotated[float | None, "Inner width of the MLPs over hidden_size"] = None
    lune_hidden_dim: Annotated[int | None, "Inner width of Lune's predictor"] = None
    sol_hidden_dim: Annotated[int | None, "Inner width of Sol's predictors"] = None
    in_channels: Annotated[int | None, "Channels of the latents. Default: the cache's"] = None
    joint_attention_dim: Annotated[int | None, "Width of the text's states. Default: the cache's"] = None
    pooled_projection_dim: Annotated[int | None, "Width of the pooled text. Default: the cache's"] = None

    def __post_init__(self) -> None:
        if self.init_from is not None and self.changes():
            raise SettingsError(f"init_from has a config of its own: leave out {', '.join(self.changes())}")

    def changes(self) -> dict[str, Any]:
        """What differs from the preset, as it was given."""
        own = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return {name: value for name, value in own.items() if value not in (None, ())}


@dataclass(frozen=True)
class DataSettings:
    """What the student is trained on: caches made by `moe-sampler tinyflux cache`."""

    caches: Annotated[
        tuple[Path, ...], "Folders of caches, or data sets owner/name on the hub, used one after the other"
    ] = ()
    repeats: Annotated[
        tuple[int, ...], "How often an epoch has each cache's samples, a number a cache. Default: once"
    ] = ()
    verify: Annotated[bool, "Compare the caches' checksums first"] = True
    held_out: Annotated[int, "The last so many samples are for validation and never trained on"] = 256

    def __post_init__(self) -> None:
        if not self.caches:
            raise SettingsError('give caches, the folders of "moe-sampler tinyflux cache"')
        if self.repeats and len(self.repeats) != len(self.caches):
            raise SettingsError(f"repeats has {len(self.repeats)} numbers for {len(self.caches)} caches")
        if any(number < 1 for number in self.repeats):
            raise SettingsError(f"repeats must be at least 1, got {list(self.repeats)}")
        if self.held_out < 0:
            raise SettingsError(f"held_out must not be negative, got {self.held_out}")


@dataclass(frozen=True)
class TeacherSettings:
    """Who teaches, and where their answers come from."""

    features: Annotated[
        Literal["cached", "live"],
        "Experts' features: those of the cache, or of experts in the loop at the student's own noisy latents",
    ] = "cached"
    experts: Annotated[
        str | None,
        "Pipeline folder or hub id with Sol and Lune, or of a Stable Diffusion base for sol and lune: for "
        "live features and for distillation. Default: the demo's where the student is the demo's",
    ] = None
    experts_preset: Annotated[str | None, f"Instead, experts by name: {any_of(PRESETS)}"] = None
    sol: Annotated[
        str | None, "Sol's weights: a folder, a .safetensors or .pt file, owner/name or owner/name:file"
    ] = None
    lune: Annotated[str | None, "Lune's weights, likewise"] = None
    experts_dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], "Precision of experts in the loop"
    ] = "float32"
    offload: Annotated[bool, "Keep experts on the CPU and bring each to the device for its call"] = False

    def __post_init__(self) -> None:
        if self.experts_preset is not None:
            try:
                preset(self.experts_preset)
            except ValueError as error:
                raise SettingsError(f"experts_preset: {error}") from None

    def places(self) -> dict[str, Any]:
        """Where the experts are, as `HybridPipeline.from_pretrained` takes it; empty where nothing says."""
        found = {
            "pretrained_model_name_or_path": self.experts,
            "preset": self.experts_preset,
            "sol": self.sol,
            "lune": self.lune,
        }
        return {name: place for name, place in found.items() if place is not None}


@dataclass(frozen=True)
class ValidationSettings:
    """Held-out losses and sheets of samples."""

    noise_levels: Annotated[tuple[float, ...], "Shares of noise at which held-out losses are taken"] = (
        *(0.1, 0.3, 0.5),
        *(0.7, 0.9),
    )
    validation_batch_size: Annotated[int, "Held-out samples computed at once"] = 32
    prompts: Annotated[tuple[str, ...], "Of the sheets of samples. Default: four held-out captions"] = ()
    encoders: Annotated[
        str | None,
        "Pipeline folder or hub id with the student's VAE and text encoders, for the sheets. Default: the "
        "teachers' experts, where they are the student's; without either there are no sheets",
    ] = None
    vae: Annotated[str | None, "Another VAE, or a pipeline that has it"] = None
    clip: Annotated[str | None, "Another CLIP text encoder, likewise"] = None
    t5: Annotated[str | None, "T5 encoder, likewise. Default: that of encoders, if it has one"] = None
    t5_length: Annotated[int | None, "Tokens of T5. Default: those of the cache"] = None
    num_inference_steps: Annotated[int, "Steps of the samples"] = 20
    guidance_scale: Annotated[float, "Guidance scale of the samples"] = 3.0

    def __post_init__(self) -> None:
        if not self.noise_levels or not all(0 < s < 1 for s in self.noise_levels):
            raise SettingsError(f"noise_levels lie between 0 and 1, got {list(self.noise_levels)}")
        for text in self.prompts:
            try:
                check_text(text, "one of the prompts")
            except ValueError as error:
                raise SettingsError(str(error)) from None
        for name in ("validation_batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class StudentSettings:
    """A whole run."""

    training: Annotated[TrainingSettings, "How"]
    data: Annotated[DataSettings, "On what"]
    model: Annotated[ModelSettings, "What"] = field(default_factory=ModelSettings)
    lora: Annotated[LoraSettings, "What of it"] = field(default_factory=LoraSettings)
    objective: Annotated[ObjectiveSettings, "For what"] = field(default_factory=ObjectiveSettings)
    alignment: Annotated[AlignmentSettings, "Whose features its tokens follow"] = field(
        default_factory=AlignmentSettings
    )
    time: Annotated[TimeSettings, "At which times"] = field(default_factory=TimeSettings)
    teachers: Annotated[TeacherSettings, "Who teaches"] = field(default_factory=TeacherSettings)
    validation: Annotated[ValidationSettings, "How it is looked at"] = field(
        default_factory=ValidationSettings
    )

    def __post_init__(self) -> None:
        if self.lora.lora_rank and self.model.init_from is None:
            raise SettingsError("lora_rank: say of which student with init_from")
