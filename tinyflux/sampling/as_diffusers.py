"""The student's pipeline for diffusers' own loader, which makes one of the components in its folder."""

# diffusers reads the annotations of `__init__`, before 0.37 only as classes, Union and Optional.
# ruff: noqa: UP007, UP045

from typing import Any, ClassVar, Optional, Union

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

from moe_sampler.tinyflux.features.encoders import StudentEncoders, TextEncoder
from moe_sampler.tinyflux.model.tinyflux import TinyFlux
from moe_sampler.tinyflux.sampling.pipeline import StudentPipeline

__all__ = ["StudentDiffusionPipeline"]


# Loading and saving are the first one's.
class StudentDiffusionPipeline(  # pyright: ignore[reportIncompatibleMethodOverride]
    StudentPipeline, DiffusionPipeline
):
    """A `StudentPipeline` without experts, made of components under diffusers' names.

    Args:
        transformer: the student.
        vae, text_encoder, tokenizer: its VAE and CLIP.
        text_encoder_2, tokenizer_2: its T5, where it has one.
    """

    _optional_components: ClassVar = ["text_encoder_2", "tokenizer_2"]

    def __init__(
        self,
        transformer: TinyFlux,
        vae: Union[AutoencoderKL, AutoencoderTiny],
        text_encoder: CLIPTextModel,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder_2: Optional[T5EncoderModel] = None,
        tokenizer_2: Optional[PreTrainedTokenizerBase] = None,
    ) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        t5 = None
        if text_encoder_2 is not None and tokenizer_2 is not None:
            length: Any = (transformer.config["encoders"] or {}).get("t5_length")
            t5 = TextEncoder(text_encoder_2, tokenizer_2, length)
        encoders = StudentEncoders(vae, TextEncoder(text_encoder, tokenizer), t5)
        StudentPipeline.__init__(self, transformer, encoders.to(torch.float32))
