"""From settings to an expert's folder: what `moe-sampler experts train` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from tqdm.auto import tqdm

from .._files import check_ours
from ..architectures import build, shape_of, watchable
from ..data.captions import report_cut
from ..data.samples import Source
from ..data.scenes import DemoScenes
from ..data.sources import open_source
from ..demo import experts_path
from ..errors import CheckpointError
from ..loading.expert_files import find_base, find_expert
from ..loading.fingerprint import fingerprint
from ..loading.folders import read_config
from ..loading.hub import Hub
from ..loading.parts import check_experts_fit, load_shared
from ..loading.presets import ExpertSource
from ..loading.weights import empty_model, file_tensors
from ..training.run_folder import KIND, own_names
from ..training.settings import SettingsError, to_tables
from ..training.trainer import Trainer
from .captions import TextStates
from .david import BlockProbes
from .images import LatentImages, encode_source, left_to_train
from .objectives import Objective
from .settings import RunSettings, check_kind
from .task import ExpertTask

__all__ = ["Base", "load_base", "new_task", "train", "train_expert"]


@dataclass(frozen=True)
class Base:
    """What an expert is trained with: the frozen parts, and the UNet it starts from."""

    vae: Any
    text: TextStates
    unet: ModelMixin

    @property
    def scale(self) -> int:
        """Pixels a side of one latent pixel."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def load_base(base: str | Path, unet: str | Path, kind: str, seed: int = 0) -> Base:
    """Everything in float32.

    Args:
        base: folder or hub id of a pipeline, for vae/, text_encoder/ and tokenizer/.
        unet: "base" for the base's own UNet of that kind (unet_<kind>/ or unet/), "new" for one of the same
            shape without its weights, or anything an `ExpertSource` may be.
        kind: "sol", "lune" or "epsilon".
        seed: of a new UNet's weights.

    Raises:
        CheckpointError: parts that are missing, damaged or of another class.
        ValueError: parts that don't fit each other.
    """
    check_kind(kind)
    hub = Hub()
    folder, index = find_base(base, hub, None, None, [kind])
    if unet == "new":
        configs = (folder / f"unet_{kind}", folder / "unet", *sorted(folder.glob("unet_*")))
        found = next((path / "config.json" for path in configs if (path / "config.json").is_file()), None)
        if found is None:
            raise CheckpointError(f"{folder} has no UNet whose shape a new one could have")
        made = _new_unet(read_config(found), seed)
    else:
        source = ExpertSource(base if unet == "base" else unet, training=_trained_as(kind))
        files = find_expert(kind, source, folder, hub, None)
        made = empty_model(files.config, str(files.where), torch.float32)
        tensors = file_tensors(files, dict(made.state_dict()))
        copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
        made.load_state_dict(copies, assign=True)
    parts = {
        name: load_shared(name, folder, index, torch.float32, None)
        for name in ("vae", "text_encoder", "tokenizer")
    }
    check_experts_fit({kind: shape_of(made)}, parts["vae"].config, parts["text_encoder"].config.to_dict())
    vae = parts["vae"].eval().requires_grad_(False)
    made.requires_grad_(True)
    return Base(vae, TextStates(parts["text_encoder"], parts["tokenizer"]), made)


def _trained_as(kind: str) -> str:
    return "sd15" if kind == "epsilon" else kind


def _new_unet(config: Mapping[str, Any], seed: int) -> ModelMixin:
    """Initial weights from the seed, leaving the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config)


def train(kind: str, settings: RunSettings, *, quiet: bool = False) -> dict[str, Any]:
    """Train an expert from its settings alone, or continue, in `settings.training.output_dir`.

    Args:
        kind: "sol", "lune" or "epsilon".
        settings: of the run.
        quiet: no progress bars.

    Raises:
        ValueError: settings, data or models that can't be used, with what to do.
    """
    data = settings.data
    if data.source is None and not data.demo:
        raise SettingsError("give a source of images and captions, or demo")
    Objective(kind, settings.expert, settings.levels)
    check_ours(settings.training.output_dir, KIND, own_names(ExpertTask.weights_name))
    base = experts_path() if data.base is None and data.demo else data.base
    if base is None:
        raise SettingsError(
            "give base, the folder or hub id of the pipeline whose VAE and text encoder the expert works with"
        )
    source = (
        DemoScenes(data.count)
        if data.source is None
        else open_source(data.source, seed=settings.training.seed, **data.reading())
    )
    models = load_base(base, data.unet, kind, settings.training.seed)
    options = {"disable": quiet, "dynamic_ncols": True, "leave": False, "delay": 0.5}
    with tqdm(total=len(source), desc="encoding", **options) as bar:

        def advance(done: int, _total: int) -> None:
            bar.update(done - bar.n)

        task = new_task(
            *(kind, source, models, settings),
            height=data.height,
            width=data.width,
            progress=advance,
        )
    return train_expert(task, settings, quiet=quiet)


def new_task(
    kind: str,
    source: Source,
    base: Base,
    settings: RunSettings,
    *,
    height: int | None = None,
    width: int | None = None,
    latents_dir: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExpertTask:
    """An expert's task on a source of images, encoded into the run's folder.

    Args:
        kind: "sol", "lune" or "epsilon".
        source, base: images and models.
        settings: of the run.
        height, width: of the images; by default the UNet's own size.
        latents_dir: where the encoded images are kept; by default the run's folder.
        progress: of the encoding.

    Raises:
        SettingsError: settings that contradict each other or the data.
    """
    objective = Objective(kind, settings.expert, settings.levels)
    kept, classes = left_to_train(len(source), settings.expert.held_out), settings.david.structure_classes
    if settings.david.use_david and classes > kept:
        raise SettingsError(f"{kept} images don't make {classes} structure_classes: lower that number")
    side = (shape_of(base.unet).sample_size or 0) * base.scale
    if not side and (height is None or width is None):
        raise SettingsError("the model's config names no size: give height and width")
    images = encode_source(
        source,
        base.vae,
        latents_dir or settings.training.output_dir,
        height=height or side,
        width=width or side,
        structure=settings.expert.structure_below > 0,
        progress=progress,
    )
    _report_long(images, base.text)
    images.about["text_encoder"] = fingerprint(base.text.model)
    data, held_out = images.split(settings.expert.held_out)
    david = settings.david
    assessor = BlockProbes(watchable(base.unet).block_channels(base.unet), david) if david.use_david else None
    return ExpertTask(
        base.unet,
        objective,
        data,
        base.text,
        settings.expert,
        held_out=held_out,
        assessor=assessor,
        david=david,
        vae=base.vae,
    )


def _report_long(images: LatentImages, text: TextStates) -> None:
    """One line about captions that every step will cut."""
    long = torch.tensor(text.too_long(images.captions.texts))[images.captions.rows].any(1).tolist()
    names = [name for name, cut in zip(images.names or (), long, strict=True) if cut]
    report_cut(names, len(images), text.tokenizer.model_max_length, type(text.model).__name__)


def train_expert(task: ExpertTask, settings: RunSettings, *, quiet: bool = False) -> dict[str, Any]:
    """Train, or continue, and leave an expert's folder that `ExpertSource(folder)` loads.

    Returns what `Trainer.train` does.
    """
    return Trainer(task, settings.training, record=to_tables(settings), quiet=quiet).train()
