"""What a pipeline's text encoder and VAE make, also outside of a call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from .base import ExpertPipeline
from .latents import decode_latents
from .prompts import (
    Negative,
    Texts,
    as_list,
    check_clip_skip,
    check_prompts,
    encode_prompts,
    negative_embeds,
    prompt_count,
)

__all__ = ["EncodingMixin"]


class EncodingMixin(ExpertPipeline):
    """Texts to features, latents to images."""

    image_processor: VaeImageProcessor

    @torch.no_grad()
    def encode_texts(
        self,
        texts: Texts,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        clip_skip: int | None = None,
    ) -> torch.Tensor:
        """[B, tokens, channels]: CLIP's hidden states, of `batch_size` texts at once. Too long a text is cut,
        with a warning. device: where the pipeline computes, by default."""
        texts = [texts] if isinstance(texts, str) else texts
        device, size = torch.device(device or self._execution_device), batch_size or len(texts)
        with self._at_work("text_encoder"):
            parts = [
                encode_prompts(texts[i : i + size], self.tokenizer, self.text_encoder, device, clip_skip)
                for i in range(0, len(texts), size)
            ]
        return torch.cat(parts)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: Texts | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Negative | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """As diffusers' Stable Diffusion pipelines have it.

        Args:
            prompt: or `prompt_embeds`.
            device: where the pipeline computes, by default.
            num_images_per_prompt: every prompt's rows are repeated so often.
            do_classifier_free_guidance: whether the negative side is wanted.
            negative_prompt, negative_prompt_embeds: as a call takes them.
            lora_scale: 1 or None; `set_adapters` sets others.
            clip_skip: last layers of CLIP that are left out of the prompt's states; of the negative ones
                none, as in diffusers.

        Returns:
            (prompt_embeds, negative_prompt_embeds), each [B, tokens, channels]; the negative ones by expert
            where they were given by expert, and None without guidance.

        Raises:
            ValueError: what a call wouldn't take.
        """
        if lora_scale not in (None, 1):
            raise ValueError("lora_scale is not supported: set_adapters sets an adapter's scale")
        prompt, negative_prompt, names = as_list(prompt), as_list(negative_prompt), self.expert_names
        channels = self.text_encoder.config.hidden_size
        check_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, names, channels)
        check_clip_skip(clip_skip, self.text_encoder)
        count, device = prompt_count(prompt, prompt_embeds), torch.device(device or self._execution_device)
        encode = partial(self.encode_texts, device=device)
        texts = [] if prompt is None else prompt
        embeds = encode(texts, clip_skip=clip_skip) if prompt_embeds is None else prompt_embeds.to(device)

        def repeated(states: torch.Tensor) -> torch.Tensor:
            return states.to(device).repeat_interleave(num_images_per_prompt, 0)

        if not do_classifier_free_guidance:
            return repeated(embeds), None
        found = negative_embeds(negative_prompt, negative_prompt_embeds, names, names, count, encode)
        negatives = {name: repeated(states) for name, states in found.items()}
        own = isinstance(negative_prompt, Mapping) or isinstance(negative_prompt_embeds, Mapping)
        return repeated(embeds), negatives if own else negatives[names[0]]

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Images from float32 latents [B, C, h, w]."""
        with self._at_work("vae"):
            return decode_latents(
                latents, self.vae, self.image_processor, output_type, self._dtype_of(self.vae)
            )
