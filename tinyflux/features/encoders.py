"""What turns images and captions into the student's inputs: its VAE, T5's hidden states, CLIP's pooled ones.

A `TextEncoder` is loaded from a folder or hub id of transformers' format, the VAE of diffusers'. A whole
pipeline (Flux's, Stable Diffusion's) serves as well as its parts: they are found in its subfolders.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

from moe_sampler.errors import CheckpointError
from moe_sampler.loading.fingerprint import portable_fingerprint
from moe_sampler.loading.folders import INDEX, load_component, load_tokenizer, read_config
from moe_sampler.loading.hub import Hub, component_patterns
from moe_sampler.loading.parts import VAES
from moe_sampler.pipelines.finite import check_finite
from moe_sampler.pipelines.prompts import tokenize, warn_of_cuts

if TYPE_CHECKING:
    from moe_sampler.pipelines.hybrid import HybridPipeline

__all__ = [
    "EncodedText",
    "StudentEncoders",
    "TextEncoder",
    "find_t5",
    "load_vae",
]

_T5_LENGTH = 128
_CLIP_PARTS = ("text_encoder", "tokenizer")
_T5_PARTS = ("text_encoder_2", "tokenizer_2")
_OF_WHOLE_MODELS = {
    CLIPTextModel: ("vision_model.", "visual_projection.", "text_projection.", "logit_scale"),
    T5EncoderModel: ("decoder.", "lm_head."),
}
"""What a CLIPModel or a whole T5 has beside its text encoder, as the published folders of both do."""


def _locate(source: str | os.PathLike, *parts: str, hub: Hub | None) -> tuple[Path, ...]:
    """Folders on this machine of a pipeline's parts, or of the component that `source` itself is.

    A hub id is downloaded, of a pipeline the parts alone.
    """
    place = (hub or Hub()).look(source)
    if place.is_file:
        raise CheckpointError(f"{source} is a file: give the folder or hub id of a model or a pipeline")
    folder = place.local([INDEX, "config.json"])
    whole = (folder / INDEX).is_file()
    if not whole and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has neither config.json nor {INDEX}: it is no model's folder")
    components = parts if whole else ("",)
    folder = place.local([pattern for part in components for pattern in component_patterns(part)])
    return tuple(folder / part for part in components)


def find_t5(pipeline: str | os.PathLike, hub: Hub | None = None) -> str | os.PathLike | None:
    """`pipeline` itself if its `text_encoder_2/` is T5, as Flux's is, else None.

    Raises:
        CheckpointError: not a pipeline's folder or hub id.
    """
    config = _locate(pipeline, _T5_PARTS[0], hub=hub)[-1] / "config.json"
    architectures = read_config(config).get("architectures") if config.is_file() else None
    return pipeline if T5EncoderModel.__name__ in (architectures or ()) else None


def load_vae(
    source: str | os.PathLike, hub: Hub | None = None, **kwargs: Any
) -> AutoencoderKL | AutoencoderTiny:
    """A VAE from its own folder, or from a pipeline's `vae/`; or from the hub.

    Args:
        source: a folder or hub id.
        hub: how to ask the hub.
        kwargs: for the class's `from_pretrained`.

    Raises:
        CheckpointError: not there, of another class, or not strictly loadable.
    """
    (folder,) = _locate(source, "vae", hub=hub)
    name = read_config(folder / "config.json").get("_class_name")
    if name not in VAES:
        raise CheckpointError(f"{folder}: the VAE is a {name}, use one of {', '.join(VAES)}")
    return load_component(VAES[name], folder, **kwargs)


class EncodedText(NamedTuple):
    """states: float32 [B, tokens, D]. mask: bool [B, tokens], True where a token counts. pooled: float32
    [B, P], or None for T5."""

    states: Tensor
    mask: Tensor
    pooled: Tensor | None


class TextEncoder:
    """T5 or CLIP with its tokenizer.

    Args:
        model: T5EncoderModel or CLIPTextModel.
        tokenizer: pads to `max_length`, and cuts there, with a warning.
        max_length: tokens; None for the tokenizer's own.
    """

    def __init__(
        self,
        model: T5EncoderModel | CLIPTextModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length = tokenizer.model_max_length if max_length is None else max_length
        if not 1 <= self.max_length <= 4096:
            raise ValueError(f"max_length must lie between 1 and 4096, got {self.max_length}")

    @classmethod
    def load(
        cls,
        kind: type[T5EncoderModel] | type[CLIPTextModel],
        source: str | os.PathLike,
        max_length: int | None = None,
        hub: Hub | None = None,
    ) -> TextEncoder:
        """`kind` from its own folder with its tokenizer, or from a pipeline's subfolder; or from the hub.

        Raises:
            CheckpointError: not there, or not strictly loadable.
        """
        parts = _T5_PARTS if kind is T5EncoderModel else _CLIP_PARTS
        folder, *beside = _locate(source, *parts, hub=hub)
        own = any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file()
        tokenizer = (
            beside[0]
            if beside
            else folder
            if own
            else folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
        )
        if not tokenizer.is_dir():
            raise CheckpointError(f"{source} has no tokenizer, in it or in {tokenizer}")
        loaded = load_tokenizer(AutoTokenizer, tokenizer)
        return cls(load_component(kind, folder, others=_OF_WHOLE_MODELS[kind]), loaded, max_length)

    def too_long(self, texts: Sequence[str]) -> list[bool]:
        """Which of them are cut."""
        return [bool(cut) for cut in tokenize(texts, self.tokenizer, self.max_length)[1]]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> EncodedText:
        tokens, cut = tokenize(texts, self.tokenizer, self.max_length)
        warn_of_cuts(cut, self.max_length)
        tokens = tokens.to(self.model.device)
        # CLIP in Stable Diffusion and Flux attends to its padding; T5 doesn't where the mask is given.
        t5 = isinstance(self.model, T5EncoderModel)
        output = self.model(tokens.input_ids, attention_mask=tokens.attention_mask if t5 else None)
        name = f"the text encoder ({type(self.model).__name__})"
        check_finite("the texts' features", output.last_hidden_state, name, self.model)
        pooled = None if t5 else output.pooler_output.float()
        return EncodedText(output.last_hidden_state.float(), tokens.attention_mask.bool(), pooled)

    def describe(self) -> dict[str, Any]:
        return {
            "class": type(self.model).__name__,
            "fingerprint": portable_fingerprint(self.model),
            "max_length": self.max_length,
        }


class StudentEncoders:
    """The student's VAE and text encoders.

    Args:
        vae: makes the student's latents.
        clip: its pooled states condition the student.
        t5: its hidden states are the student's text tokens; without it CLIP's are.
    """

    def __init__(
        self, vae: AutoencoderKL | AutoencoderTiny, clip: TextEncoder, t5: TextEncoder | None = None
    ) -> None:
        self.vae, self.clip, self.t5 = vae, clip, t5

    @classmethod
    def gather(
        cls,
        experts: HybridPipeline | None = None,
        *,
        encoders: str | os.PathLike | None = None,
        vae: str | os.PathLike | None = None,
        clip: str | os.PathLike | None = None,
        t5: str | os.PathLike | None = None,
        t5_length: int | None = None,
        device: torch.device | str = "cpu",
        hub: Hub | None = None,
    ) -> StudentEncoders:
        """As `load`, where one place may hold several of them.

        Args:
            experts: whose VAE and text encoder serve where nothing else is said of all of them, or of one.
            encoders: a pipeline's folder or hub id with the student's VAE, CLIP and, if it is Flux's, T5.
            vae, clip, t5: others than these.
            t5_length: 128 by default.

        Raises:
            CheckpointError: as `load`.
            ValueError: nothing says where one of them is.
        """
        if experts is not None and (encoders, vae, clip, t5) == (None,) * 4:
            return cls(experts.vae, TextEncoder(experts.text_encoder, experts.tokenizer))
        base = encoders if encoders is not None or experts is None else experts.config["_name_or_path"]
        t5 = find_t5(encoders, hub) if t5 is None and encoders is not None else t5
        vae, clip = vae or base, clip or base
        if vae is None or clip is None:
            raise ValueError(
                "say which encoders the student was trained with: give encoders, or vae and clip, or the "
                "experts whose they are"
            )
        length = _T5_LENGTH if t5_length is None else t5_length
        return cls.load(vae, clip, t5, t5_length=length, device=device, hub=hub)

    @classmethod
    def load(
        cls,
        vae: str | os.PathLike,
        clip: str | os.PathLike,
        t5: str | os.PathLike | None = None,
        *,
        t5_length: int = _T5_LENGTH,
        device: torch.device | str = "cpu",
        hub: Hub | None = None,
    ) -> StudentEncoders:
        """Everything from folders or hub ids, in float32, on `device`; `hub` says how to ask the hub."""
        made = cls(
            load_vae(vae, hub),
            TextEncoder.load(CLIPTextModel, clip, hub=hub),
            None if t5 is None else TextEncoder.load(T5EncoderModel, t5, t5_length, hub),
        )
        return made.to(device, torch.float32)  # transformers leaves weights in the precision of their file

    def to(self, *args: Any) -> StudentEncoders:
        """All of them, as `torch.nn.Module.to`."""
        for model in (self.vae, self.clip.model, *([] if self.t5 is None else [self.t5.model])):
            model.to(*args)
        return self

    @property
    def scale(self) -> int:
        """Pixels a side of one latent pixel."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def text(self, texts: Sequence[str]) -> EncodedText:
        """States and mask of T5, or of CLIP without it; pooled states of CLIP."""
        clip = self.clip(texts)
        return clip if self.t5 is None else self.t5(texts)._replace(pooled=clip.pooled)

    def describe(self) -> dict[str, Any]:
        """What a cache's manifest says of them; without T5 it says that CLIP's states are the text's."""
        return {
            "vae": {
                "class": type(self.vae).__name__,
                "fingerprint": portable_fingerprint(self.vae),
                "scaling_factor": self.vae.config["scaling_factor"],
                "shift_factor": self.vae.config.get("shift_factor") or 0.0,
            },
            "clip": self.clip.describe(),
            "t5": None if self.t5 is None else self.t5.describe(),
            "text_states": "clip" if self.t5 is None else "t5",
        }
