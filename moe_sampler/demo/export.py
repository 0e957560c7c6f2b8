"""Write the demo experts as one folder in Stable Diffusion layout, fp16."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderTiny, ModelMixin
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from .._files import MARK, claim, is_ours, remove, replace_folder, writing
from ..architectures.unet import UNET
from ..errors import CheckpointError
from .experts import lune_scheduler, sol_scheduler
from .tokenizer import write_tokenizer

COMPONENTS = {
    "vae": ("diffusers", "AutoencoderTiny"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet_sol": ("diffusers", UNET.class_name),
    "unet_lune": ("diffusers", UNET.class_name),
    "scheduler_sol": ("diffusers", "DDPMScheduler"),
    "scheduler_lune": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}
KIND = "demo experts"
SETTINGS = {
    **{"handoff": 0.9, "num_inference_steps": 10, "sol_guidance": 2.5, "lune_guidance": 2.5},
    **{"lune_solver": "dpmpp_2m", "lune_levels": "beta"},
}
"""What the pipeline does with these experts when not told otherwise; Lune's solver and levels are those that
docs/SOLVERS.md found best."""


def export_experts(
    output: Path,
    vae: AutoencoderTiny,
    text: CLIPTextModel,
    sol: ModelMixin,
    lune: ModelMixin,
) -> None:
    """Write all components to `output`.

    The folder is replaced as a whole: at any time it is the old one or the complete new one. The models are
    converted to fp16 in place.

    Raises:
        CheckpointError: `output` holds what is not from an export.
        OSError: it can't be written.
    """
    output = Path(output)
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp"))
    try:
        with writing(output):
            _write(temporary, vae, text, sol, lune)
            for file in (temporary, *temporary.rglob("*")):
                file.chmod(0o755 if file.is_dir() else 0o644)
            replace_folder(temporary, output)
    finally:
        remove(temporary)


def check_output(output: Path) -> None:
    """Raise CheckpointError unless `output` is new, empty, or experts that were exported before and nothing
    else."""
    if output.is_symlink():
        raise CheckpointError(f"{output} is a link, which is not followed: give another folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_ours(output, KIND):
        raise CheckpointError(f"{output} is there and not a folder of {KIND}: give another folder")
    others = {path.name for path in output.iterdir()} - {*COMPONENTS, "model_index.json", MARK}
    if others:
        raise CheckpointError(f"{output} is to be replaced, but has a {min(others)} too: move it away")


def _write(
    temporary: Path, vae: AutoencoderTiny, text: CLIPTextModel, sol: ModelMixin, lune: ModelMixin
) -> None:
    claim(temporary, KIND)
    for name, model in (("vae", vae), ("text_encoder", text), ("unet_sol", sol), ("unet_lune", lune)):
        half = {"dtype": torch.float16, "memory_format": torch.contiguous_format}
        torch.nn.Module.to(model, **half)  # pyright: ignore[reportCallIssue]
        model.save_pretrained(temporary / name)
    _use_published_names(temporary / "text_encoder" / "model.safetensors")
    # AutoencoderTiny sets block_out_channels itself, and warns when its own config file holds them.
    config = temporary / "vae" / "config.json"
    kept = {
        key: value for key, value in json.loads(config.read_text()).items() if key != "block_out_channels"
    }
    config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(temporary / "tokenizer")
    sol_scheduler().save_pretrained(temporary / "scheduler_sol")
    lune_scheduler().save_pretrained(temporary / "scheduler_lune")
    index: dict[str, Any] = {"_class_name": "HybridPipeline", "_diffusers_version": diffusers.__version__}
    index.update(SETTINGS)
    index.update({name: list(source) for name, source in COMPONENTS.items()})
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _use_published_names(file: Path) -> None:
    """The names of a CLIP text encoder's tensors as published Stable Diffusion folders have them, which every
    version of transformers reads. Newer ones leave the prefix out when they save."""
    prefix = "text_model."
    tensors = {prefix + name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
