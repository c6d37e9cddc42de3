"""PaliGemma (arXiv:2407.07726, 2412.03555): the image tower and a projection in front of the decoder of the family.

    pixels ─ vision_tower ─ multi_modal_projector ─┐
    ids ─────────────────── embed_tokens ──────────┴─ put in its rows ─ layers ... of language_model

Image features take the rows of their placeholders after the embedding, and are not scaled as embeddings are. Images
and prompt are a span of the batch, whose tokens see one another; what follows is causal.
"""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from gemkit import family, ops
from gemkit.errors import ConfigError
from gemkit.nn.batch import Batch
from gemkit.nn.decoder import Decoder, Output
from gemkit.nn.layers import Linear, ParamModule
from gemkit.nn.siglip import Siglip
from gemkit.nn.state import State


class Projector(Module):
    """From the tower's width to the decoder's."""

    def __init__(self, vision: family.Vision, config: family.DecoderConfig):
        super().__init__()
        self.linear = Linear(vision.width, config.width, bias=True)

    def forward(self, x_TW):
        return self.linear(x_TW)


class PaliGemma(Module):
    """Images and token ids to logits. It is used as a `Decoder` is; `model(batch, pixels_ICSS=...)` shows it images.

    Raises:
        ConfigError: if the decoder's table has no row for the image placeholder.
    """

    score: Any = None  # no reward model sees images

    def __init__(self, config: family.DecoderConfig, vision: family.Vision):
        super().__init__()
        if vision.image_token >= config.vocab_size:
            raise ConfigError(f"image_token={vision.image_token} is beyond the {config.vocab_size} rows of vocabulary")
        self.config, self.vision = config, vision
        self.vision_tower = Siglip(vision)
        self.multi_modal_projector = Projector(vision, config)
        self.language_model = Decoder(config)

    def forward(
        self,
        batch: Batch | Any,
        state: State | None = None,
        rows=None,
        pixels_ICSS=None,
        *,
        output: Output = "logits",
        loss: ops.ChunkedLoss | None = None,
    ):
        """As of `Decoder`, of a batch whose `image_rows` are the patches of these images, one after another.

        Args:
            pixels_ICSS: (I, 3, S, S) in -1 to 1; None: no image is in this batch.
        """
        features_ED = None if pixels_ICSS is None else self.image_features(pixels_ICSS)
        return self.language_model(batch, state, rows, features_ED, output=output, loss=loss)

    def image_features(self, pixels_ICSS):
        """(I * P, D): what the decoder sees of each patch of each image."""
        return self.multi_modal_projector(self.vision_tower(pixels_ICSS))

    @property
    def embed_tokens(self):
        return self.language_model.embed_tokens

    @property
    def lm_head(self):
        return self.language_model.lm_head

    @property
    def norm(self):
        return self.language_model.norm

    def hold(self, name: str, value) -> None:
        """Put a weight where it belongs by its name."""
        of_decoder = name.removeprefix("language_model.")
        if of_decoder != name:
            self.language_model.hold(of_decoder, value)
            return
        path, _, leaf = name.rpartition(".")
        owner = self.get_submodule(path)
        assert isinstance(owner, ParamModule)
        owner.hold(leaf, value)

    def new_state(self, slots: int = 1, room: int = 0) -> State:
        """An empty memory for `slots` sequences, of which `room` tokens may be rolled back."""
        return self.language_model.new_state(slots, room)


def build(config: family.DecoderConfig, vision: family.Vision | None = None) -> Decoder | PaliGemma:
    """The module of a member. New weights are zeros."""
    return Decoder(config) if vision is None else PaliGemma(config, vision)
