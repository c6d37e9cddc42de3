"""Image towers in front of the decoder of the family (PaliGemma, arXiv:2407.07726, 2412.03555).

    pixels ─ vision_tower ─ multi_modal_projector ─┐
    ids ─────────────────── embed_tokens ──────────┴─ put in its rows ─ layers ... of language_model

Image features take the rows of their placeholders after the embedding, and are not scaled as embeddings are. Which
tokens see one another is the batch's to say.
"""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from gemkit import family, ops
from gemkit.errors import ConfigError
from gemkit.nn.batch import Batch
from gemkit.nn.decoder import Decoder
from gemkit.nn.layers import Linear
from gemkit.nn.model import LanguageModel, Output
from gemkit.nn.siglip import Siglip
from gemkit.nn.state import State


class Projector(Module):
    """From the tower's width to the decoder's."""

    def __init__(self, vision: family.Modality, config: family.DecoderConfig):
        super().__init__()
        self.linear = Linear(vision.tower.width, config.width, bias=vision.projection.bias)

    def forward(self, x_TW):
        return self.linear(x_TW)


class Multimodal(LanguageModel):
    """A tower, a projection and a decoder: images and token ids to logits.

    Raises:
        ConfigError: if the decoder's table has no row for the image placeholder.
    """

    score: Any = None  # no reward model sees images

    def __init__(self, config: family.DecoderConfig, vision: family.Modality):
        super().__init__()
        if vision.placeholder >= config.vocab_size:
            raise ConfigError(f"placeholder={vision.placeholder} is beyond the {config.vocab_size} rows of vocabulary")
        self.config, self.vision = config, vision
        self.vision_tower = Siglip(vision.tower)
        self.multi_modal_projector = Projector(vision, config)
        self.language_model = Decoder(config)

    def forward(
        self,
        batch: Batch | Any,
        state: State | None = None,
        rows=None,
        pixels_ICSS=None,
        *,
        features_ED=None,
        output: Output = "logits",
        loss: ops.ChunkedLoss | None = None,
    ):
        if pixels_ICSS is not None:
            features_ED = self.image_features(pixels_ICSS)
        return self.language_model(batch, state, rows, features_ED=features_ED, output=output, loss=loss)

    def image_features(self, pixels_ICSS):
        """(I * P, D): what the decoder sees of each patch of each image."""
        return self.multi_modal_projector(self.vision_tower(pixels_ICSS))

    @property
    def decoder(self) -> Decoder:
        return self.language_model

    @property
    def decoder_path(self) -> str:
        return "language_model"

    @property
    def blocks(self) -> list[Module]:
        return [*self.vision_tower.encoder.layers, *self.language_model.blocks]


def build(config: family.DecoderConfig, vision: family.Modality | None = None) -> Decoder | Multimodal:
    """The module of a member. New weights are zeros."""
    return Decoder(config) if vision is None else Multimodal(config, vision)
