"""Settings of an expert's training beside those of every training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from ..loading.presets import TRAINING
from ..training.settings import SettingsError, nearest
from ..training.training_settings import TrainingSettings

__all__ = [
    "KINDS",
    "DataSettings",
    "DavidSettings",
    "ExpertSettings",
    "Kind",
    "LevelSettings",
    "scheduler_config",
]

Kind = Literal["sol", "lune", "epsilon"]
KINDS: tuple[str, ...] = get_args(Kind)
Density = Literal["uniform", "shifted", "focus"]

_TRAINED_AS: Mapping[str, str] = {"sol": "sol", "lune": "lune", "epsilon": "sd15"}
_DENSITIES: Mapping[str, Density] = {"sol": "shifted", "lune": "shifted", "epsilon": "uniform"}
_BETAS: Mapping[str, tuple[float, float]] = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}


@dataclass(frozen=True)
class DataSettings:
    """Which images, and the models an expert is trained with."""

    source: Annotated[
        Path | None,
        "Images and captions: a folder (a.png + a.txt, metadata.jsonl or metadata.csv), .tar or .parquet "
        "files, or a data set of the Hugging Face hub, owner/name",
    ] = None
    caption_fields: Annotated[
        tuple[str, ...],
        "Where captions stand: a column, text (.txt files), filename. Several, and each image gets one of "
        "them, drawn",
    ] = ()
    captions_per_image: Annotated[int, "Samples of each image, with another caption while there are any"] = 1
    image_field: Annotated[str | None, "Column of the pictures. Default: the only one"] = None
    split: Annotated[str, "Of a hub data set"] = "train"
    subset: Annotated[str | None, "Of a hub data set"] = None
    revision: Annotated[str | None, "Of a hub data set"] = None
    streaming: Annotated[bool, "Read a data set as it comes, without a copy of it on the disk"] = False
    images: Annotated[int | None, "The first so many of the source. Default: all"] = None
    demo: Annotated[bool, "The demo's drawn scenes, with its VAE and text encoder, instead of a source"] = (
        False
    )
    count: Annotated[int, "demo: how many scenes"] = 4000
    base: Annotated[
        str | None,
        "Folder or hub id of a pipeline, for its vae/, text_encoder/ and tokenizer/. Default with demo: the "
        "experts that ship",
    ] = None
    unet: Annotated[
        str,
        "Where training starts: base (unet_<kind>/ or unet/ of the base), new (its shape, fresh weights), or "
        "a folder, file or hub id of an expert",
    ] = "base"
    height: Annotated[int | None, "Of the images, which are resized and cut. Default: the UNet's own"] = None
    width: Annotated[int | None, "Of the images. Default: the UNet's own"] = None

    def __post_init__(self) -> None:
        if self.demo and self.source is not None:
            raise SettingsError("give a source of images and captions, or demo, not both")
        if self.demo and (others := [name for name, value in self.reading().items() if value]):
            raise SettingsError(f"{', '.join(others)}: for a source, not for the demo's scenes")
        if self.count < 2:
            raise SettingsError(f"count must be at least 2, got {self.count}")

    def reading(self) -> dict[str, Any]:
        """How the source is read, as `data.options.Reading` has it, without what is that way by default."""
        names = ("caption_fields", "captions_per_image", "image_field", "split", "subset", "revision")
        found = {name: getattr(self, name) for name in (*names, "streaming")} | {"count": self.images}
        plain = {"captions_per_image": 1, "split": "train"}
        return {name: value for name, value in found.items() if value and value != plain.get(name)}


@dataclass(frozen=True)
class LevelSettings:
    """How training samples are spread over the noise levels."""

    density: Annotated[
        Density | None,
        "uniform (over s, or over timesteps on a DDPM path), shifted (s moved towards noise), or focus (most "
        "below one s). Default: shifted for Sol and Lune, uniform for epsilon",
    ] = None
    shift: Annotated[float, "k of the shifted density, and of Lune's sampling"] = 2.0
    focus: Annotated[float, "The s below which the focused samples lie"] = 0.8
    focus_share: Annotated[float, "Share of the samples that are focused"] = 0.85
    min_snr_gamma: Annotated[float | None, "Min-SNR weighting with this gamma; none without it"] = None

    def __post_init__(self) -> None:
        if not 0 < self.shift < float("inf"):
            raise SettingsError(f"shift must be positive and finite, got {self.shift}")
        if not 0 < self.focus <= 1:
            raise SettingsError(f"focus must lie in (0, 1], got {self.focus}")
        if not 0 <= self.focus_share <= 1:
            raise SettingsError(f"focus_share must lie between 0 and 1, got {self.focus_share}")
        if self.min_snr_gamma is not None and not 0 < self.min_snr_gamma < float("inf"):
            raise SettingsError(f"min_snr_gamma must be positive and finite, got {self.min_snr_gamma}")


@dataclass(frozen=True)
class DavidSettings:
    """The assessor that weighs samples by what the UNet's blocks know of them."""

    use_david: Annotated[bool, "Weigh samples by David's assessment"] = False
    probe_bins: Annotated[int, "Bins of the noise level that probes tell apart"] = 10
    structure_classes: Annotated[int, "Structure classes: clusters of the coarse latents"] = 16
    weight_strength: Annotated[float, "Weight for one unit of surprise; 0 assesses without weighing"] = 2.0
    lowest_weight: Annotated[float, "No sample's weight is below"] = 0.5
    highest_weight: Annotated[float, "No sample's weight is above"] = 2.0

    def __post_init__(self) -> None:
        if self.probe_bins < 2 or self.structure_classes < 2:
            raise SettingsError(
                f"probe_bins and structure_classes must be at least 2, got {self.probe_bins} and "
                f"{self.structure_classes}: there is nothing to tell apart"
            )
        if not 0 <= self.weight_strength < float("inf"):
            raise SettingsError(f"weight_strength must not be negative, got {self.weight_strength}")
        if not 0 < self.lowest_weight < 1 < self.highest_weight < float("inf"):
            raise SettingsError(
                f"weights lie between lowest_weight < 1 and highest_weight > 1, got {self.lowest_weight} "
                f"and {self.highest_weight}"
            )


@dataclass(frozen=True)
class ExpertSettings:
    """What an expert is trained on."""

    beta_schedule: Annotated[
        Literal["linear", "scaled_linear"] | None,
        "Betas of a DDPM path: linear (1e-4 to 0.02) or scaled_linear (Stable Diffusion's). Default: linear "
        "for Sol, scaled_linear for epsilon",
    ] = None
    caption_dropout: Annotated[float, "Share of the samples that see the empty caption"] = 0.1
    structure_below: Annotated[
        float,
        "Below this s the structure pictures are the data, where there are such (the demo's); 0.65 made the "
        "demo's Sol",
    ] = 0.0
    held_out: Annotated[int, "Images, the last ones, that are kept for validation"] = 64
    num_validation_images: Annotated[int, "Pictures made of held-out captions, for eyes"] = 4
    num_inference_steps: Annotated[int, "Steps of those pictures"] = 20
    guidance_scale: Annotated[float, "Guidance scale of those pictures"] = 2.5

    def __post_init__(self) -> None:
        for name in ("caption_dropout", "structure_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name, least in (("held_out", 0), ("num_validation_images", 0), ("num_inference_steps", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class RunSettings:
    """All settings of a run, by the tables of its file."""

    training: Annotated[TrainingSettings, "How"]
    data: Annotated[DataSettings, "Images and models"] = field(default_factory=DataSettings)
    expert: Annotated[ExpertSettings, "What on"] = field(default_factory=ExpertSettings)
    levels: Annotated[LevelSettings, "The noise levels"] = field(default_factory=LevelSettings)
    david: Annotated[DavidSettings, "Weights from the UNet's own blocks"] = field(
        default_factory=DavidSettings
    )


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise SettingsError(f'there is no kind of expert "{kind}"{nearest(kind, KINDS)}: {", ".join(KINDS)}')


def density_of(kind: str, levels: LevelSettings) -> Density:
    """The density that `levels` names, or the kind's own."""
    check_kind(kind)
    return levels.density or _DENSITIES[kind]


def scheduler_config(kind: str, expert: ExpertSettings, levels: LevelSettings) -> dict[str, Any]:
    """The diffusers scheduler config that says what an expert is trained on.

    Raises:
        SettingsError: an unknown kind, or betas for a flow.
    """
    check_kind(kind)
    config = dict(TRAINING[_TRAINED_AS[kind]])
    if kind == "lune":
        if expert.beta_schedule is not None:
            raise SettingsError("lune is trained on a flow, which has no betas: leave beta_schedule out")
        return {**config, "shift": levels.shift}
    if expert.beta_schedule is not None:
        start, end = _BETAS[expert.beta_schedule]
        config.update(beta_schedule=expert.beta_schedule, beta_start=start, beta_end=end)
    return config
