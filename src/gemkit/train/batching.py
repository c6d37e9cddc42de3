"""Batches of training examples: sequences with a weight for the loss of each token, packed end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemkit.errors import ConfigError
from gemkit.nn import Batch, LanguageModel
from gemkit.ops import ChunkedLoss


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence to learn from.

    `weights[i]` is what the loss of predicting `ids[i]` from those before it counts: 0 for what is only read, such as
    a question; `weights[0]` is 0, for nothing comes before it.
    """

    ids: np.ndarray  # (L,) int64
    weights: np.ndarray  # (L,) float32
    prefix: int = 0  # tokens from the first on that see one another: those of a prompt with images
    images: tuple[np.ndarray, ...] = ()  # (3, S, S) float32 each, in -1 to 1; their placeholders are in `ids`, in order
    image_token: int | None = None  # the id of a placeholder, where there are images
    extra: Mapping[str, Any] = field(default_factory=dict)  # what else an objective needs of it

    def __post_init__(self):
        """Raises: ConfigError, if the parts do not agree."""
        if not len(self.ids) == len(self.weights) or len(self.ids) < 2:
            raise ConfigError(f"{len(self.ids)} ids and {len(self.weights)} weights: as many of each, and two at least")
        if self.weights[0] != 0:
            raise ConfigError(
                f"weights[0]={self.weights[0]:g}: the first token has none before it to be predicted from"
            )

    def __len__(self) -> int:
        return len(self.ids)


ExampleGroup = tuple[
    Example, ...
]  # what stays together in one step: one example, a preferred and a rejected answer, a group


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Examples end to end, and which of their rows predict something that counts.

    M rows carry loss; `rows[m]` is the row whose hidden state predicts `targets[m]`, the token after it.
    """

    batch: Batch
    rows: Tensor  # (M,) int64
    targets: Tensor  # (M,) int64
    weights: Tensor  # (M,) float32
    sequences: Tensor  # (M,) int64: the example that each row belongs to, by its number in the batch
    pixels_ICSS: Tensor | None  # of all images in the order of their placeholders; None: there are none

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device | str | None = None) -> PackedBatch:
        """Lay examples end to end."""
        starts = [0, *accumulate(map(len, examples))]
        weights = np.concatenate([example.weights for example in examples])
        ids = np.concatenate([example.ids for example in examples])
        predicted = np.flatnonzero(weights)
        pictures = [image for example in examples for image in example.images]
        image_rows = [
            start + np.flatnonzero(example.ids == example.image_token)
            for start, example in zip(starts, examples, strict=False)
            if example.images
        ]
        batch = Batch.of(
            [torch.from_numpy(example.ids) for example in examples],
            spans=[(start, start + e.prefix) for start, e in zip(starts, examples, strict=False) if e.prefix],
            image_rows=torch.from_numpy(np.concatenate(image_rows)) if image_rows else (),
            device=device,
        )
        sequences = np.searchsorted(np.asarray(starts), predicted, side="right") - 1

        def there(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            batch,
            there(predicted - 1),
            there(ids[predicted].astype(np.int64)),
            there(weights[predicted].astype(np.float32)),
            there(sequences.astype(np.int64)),
            there(np.stack(pictures).astype(np.float32)) if pictures else None,
        )

    def hidden(self, model: LanguageModel) -> Tensor:
        """(M, D): the hidden state after the last norm of each row. `model` is an `nn.LanguageModel`."""
        return model(self.batch, None, self.rows, self.pixels_ICSS, output="hidden")

    def loss(self, model: LanguageModel, loss: ChunkedLoss) -> Any:
        """The result of a loss of the logits of each row, by the model's own forward."""
        return model(self.batch, None, self.rows, self.pixels_ICSS, output="loss", loss=loss)
