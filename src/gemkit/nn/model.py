"""The interface of a language model: what loaders, executors, adapters and training may ask of one.

`decoder.Decoder` reads text alone; `multimodal.Multimodal` puts an image tower in front of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch.nn import Module

from gemkit import family, ops
from gemkit.errors import ConfigError
from gemkit.nn.batch import Batch
from gemkit.nn.layers import ParamModule
from gemkit.nn.state import State

if TYPE_CHECKING:
    from gemkit.nn.decoder import Decoder

Output = Literal["logits", "hidden", "loss", "reward"]


class LanguageModel(Module):
    """Token ids, and images where it has a tower, to what its head makes of them. New weights are zeros.

    `model(batch)` computes a ragged batch, `model(tokens_BT)` the rows of a rectangle.
    """

    config: family.DecoderConfig
    vision: family.Modality | None  # how it sees images; None: it reads text alone
    score: Any  # of a reward model: a `layers.Score`, which reads what the head reads

    def __init__(self):
        super().__init__()
        self.replaced: list[Any] = []  # weights that adapters have exchanged, with the model's own (adapters.replaced)

    @property
    def decoder(self) -> Decoder:
        """The text decoder: the model itself, or the part behind its towers."""
        raise NotImplementedError

    @property
    def decoder_path(self) -> str:
        """The name of the decoder among the model's modules; "" if it is the model itself."""
        return ""

    @property
    def blocks(self) -> list[Module]:
        """The residual blocks, the tower's first: the units of activation checkpointing and of sharding."""
        raise NotImplementedError

    @property
    def device(self) -> Any:
        """The device of the weights, taken from one of them."""
        return next(self.parameters()).device

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
        """The output of every token, or of `rows` of them only: the last norm, then the head.

        Args:
            batch: a `Batch` of T tokens, or a (B, T) tensor of ids.
            state: the memory of the sequences before; it remembers these tokens after.
            rows: (R,) int64: the rows of output among the T tokens. None: all.
            pixels_ICSS: (I, 3, S, S) in -1 to 1: the images whose patches, one after another, are the batch's
                `image_rows`; None: no image is in this batch.
            features_ED: in place of pixels, the features of those patches, which are not scaled as embeddings are.
            output: "logits": (R, V) or (T, V), for a (B, T) tensor (B, T, V); in float32 where a final soft cap
                applies, else in the run dtype. "hidden": the hidden state after the last norm, (R, D). "loss": the
                result of `loss` on the logits, a chunk of rows at a time. "reward": (R,), the number of a reward head.
            loss: of the output "loss".

        Raises:
            ConfigError: for images without a tower, or a reward of a model that has no such head.
        """
        raise NotImplementedError

    def image_features(self, pixels_ICSS) -> Any:
        """(E, D): the features of all images, which take the rows of their placeholders; pixels as in `forward`.

        Raises:
            ConfigError: if the model has no image tower.
        """
        raise ConfigError("this model has no image tower: its images must come as features")

    def set_param(self, name: str, value) -> None:
        """Replace a weight by its name, dense or quantized. The head follows the embedding that it is tied to."""
        path, _, leaf = name.rpartition(".")
        owner = self.get_submodule(path)
        assert isinstance(owner, ParamModule)
        owner.set_param(leaf, value)
        if owner is self.decoder.embed_tokens:
            self.decoder.lm_head.set_param(leaf, value)

    def get_param(self, name: str) -> Any:
        """A weight by its name: a tensor, or an `ops.Quantized`."""
        path, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(path), leaf)

    def new_state(self, slots: int = 1) -> State:
        """An empty memory for `slots` sequences, to begin with."""
        weight = self.decoder.norm.weight  # in the run dtype, whatever the others are stored in
        return State(self.config, slots, dtype=weight.dtype, device=weight.device)
