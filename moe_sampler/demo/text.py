"""The demo's text encoder: a small CLIPTextModel trained against pictures and attributes.

Trained contrastively with an image encoder (as CLIP is), and to tell from a caption which attribute has which
value or is left unsaid. The image encoder and the heads are scaffolding: only the text model ships.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .._transfers import OnDevice
from ..training.draws import Draws
from .attributes import AttributeHeads, ImageEncoder, augment, heads_loss
from .autoencoder import to_model
from .data import SceneSet
from .scene_task import SceneLoss

WIDTH = 128


def new_text_encoder(tokenizer: CLIPTokenizer, width: int = WIDTH, layers: int = 2) -> CLIPTextModel:
    """An untrained text encoder for the tokenizer's vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=_id(tokenizer, "bos_token_id"),
        eos_token_id=_id(tokenizer, "eos_token_id"),
        pad_token_id=_id(tokenizer, "pad_token_id"),
    )
    return CLIPTextModel(config)


def _id(tokenizer: CLIPTokenizer, name: str) -> int:
    found = getattr(tokenizer, name)
    assert isinstance(found, int)
    return found


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """int64 [N, model_max_length], padded and cut as Stable Diffusion pipelines do."""
    batch = tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return batch.input_ids


class TextTrainer(nn.Module):
    """The text model with its scaffolding."""

    def __init__(self, text: CLIPTextModel, width: int = WIDTH) -> None:
        super().__init__()
        self.text = text
        self.images = ImageEncoder(width)
        self.image_heads = AttributeHeads(width)
        self.text_heads = AttributeHeads(text.config.hidden_size, unsaid=True)
        self.project = nn.Linear(text.config.hidden_size, width)
        self.temperature = nn.Parameter(torch.tensor(2.5))

    def forward(self, ids: Tensor, images: Tensor):
        """Contrastive logits [N, N] (text, image) and both sides' attribute logits."""
        pooled = self.text(ids).pooler_output
        seen = self.images(images)
        a, b = F.normalize(self.project(pooled), dim=-1), F.normalize(seen, dim=-1)
        return (
            a @ b.T * self.temperature.exp().clamp(max=60),
            self.text_heads(pooled),
            self.image_heads(F.silu(seen)),
        )


def text_loss(model: TextTrainer, scenes: SceneSet) -> SceneLoss:
    """The stage's loss: contrastive plus attributes from text and from pictures."""
    words = scenes.words
    pictures, strange, labels, said = (
        OnDevice(torch.from_numpy(array))
        for array in (scenes.pictures, words.strange, words.labels, words.said)
    )
    texts = words.strange.shape[1]

    def loss(which: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        device = which.device
        choice = draws.integers("caption", texts)
        full = torch.zeros_like(which)
        images = augment(to_model(pictures.on(device)[which, full]), draws, 0.4)
        match, from_text, from_image = model(strange.on(device)[which, choice].long(), images)
        # Pictures of the same description are no mistakes: captions that leave much out fit many pictures, so
        # the contrastive part only needs to pull, softly.
        target = torch.arange(len(which), device=device)
        contrast = F.cross_entropy(match, target) + F.cross_entropy(match.T, target)
        read, read_accuracy = heads_loss(from_text, said.on(device)[which, choice])
        seen, seen_accuracy = heads_loss(from_image, labels.on(device)[which])
        return 0.1 * contrast + read + 0.3 * seen, {"text": read_accuracy, "image": seen_accuracy}

    return loss
