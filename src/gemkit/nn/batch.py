"""A ragged batch: the tokens of all sequences laid end to end, without padding.

Prefill, decode, chunked prefill, packed training rows and a mixed batch of a server are all the same call: there is no
pad token that could leak into a softmax, a convolution or a recurrence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree

from gemkit.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """New tokens of B sequences.

    `tokens` and `positions` live where the model does; the boundaries live on the CPU, where they are read.
    """

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64: 0 for the first token of a sequence, counting on from what a State remembers
    starts: Tensor  # (B + 1,) int64, CPU: sequence b is rows starts[b] to starts[b + 1]
    offsets: Tensor  # (B,) int64, CPU: the position of each sequence's first row
    slots: Tensor  # (B,) int64, CPU: where each sequence is remembered in a State
    spans: Tensor  # (M, 2) int64, CPU: rows spans[m, 0] to spans[m, 1], of one sequence, see one another
    image_rows: Tensor  # (E,) int64: the rows that image features take the place of, in the order of the features

    def __post_init__(self):
        """Raises: ConfigError, if the boundaries do not cut the tokens into sequences of at least one, or cut a
        span, or spans overlap or do not ascend."""
        starts, rows = self.starts, len(self.tokens)
        if len(starts) < 2 or starts[0] != 0 or starts[-1] != rows or not (starts[1:] > starts[:-1]).all():
            raise ConfigError(f"starts={starts.tolist()} must rise from 0 to the number of tokens, {rows}")
        if len(self.positions) != rows or not len(self.slots) == len(self.offsets) == len(starts) - 1:
            raise ConfigError(
                f"{rows} tokens in {len(starts) - 1} sequences, but {len(self.positions)} positions, "
                f"{len(self.offsets)} offsets and {len(self.slots)} slots: must agree"
            )
        if not len(self.spans):  # nearly always: then nothing more is computed
            return
        begins, ends = self.spans.T.contiguous()
        if not (begins[0] >= 0 and ends[-1] <= rows and (begins < ends).all() and (ends[:-1] <= begins[1:]).all()):
            raise ConfigError(f"spans={self.spans.tolist()} must be rows of the {rows}, ascending and disjoint")
        if (torch.searchsorted(starts, begins, right=True) != torch.searchsorted(starts, ends)).any():
            raise ConfigError(
                f"spans={self.spans.tolist()} are cut by the borders of sequences {starts.tolist()}: a span is "
                "computed whole, in one sequence, for each of its tokens sees all others"
            )

    @classmethod
    def of(
        cls,
        sequences: Sequence[Sequence[int] | Tensor],
        *,
        offsets: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
        spans: Sequence[tuple[int, int]] = (),
        image_rows: Sequence[int] | Tensor = (),
        device: torch.device | str | None = None,
    ) -> Batch:
        """Lay sequences end to end.

        Args:
            sequences: the new token ids of each.
            offsets: position of each one's first token (default: all 0).
            slots: state slot of each (default: 0, 1, 2, ...).
            spans: (first, end) rows, counted over all sequences, that see one another whatever a layer's window.
            image_rows: which of all rows take image features instead of their token's embedding.
        """
        offsets = [0] * len(sequences) if offsets is None else offsets
        slots = range(len(sequences)) if slots is None else slots
        if not sequences or any(len(ids) == 0 for ids in sequences):
            raise ConfigError("a batch needs at least one sequence, and each at least one token")
        if not len(sequences) == len(offsets) == len(slots):
            raise ConfigError(f"{len(sequences)} sequences, {len(offsets)} offsets and {len(slots)} slots: must agree")
        if len(set(slots)) < len(slots) or min(slots) < 0 or min(offsets) < 0:
            raise ConfigError(f"slots={list(slots)} must differ, and slots and offsets={list(offsets)} be 0 or more")
        lengths = torch.tensor([len(ids) for ids in sequences])
        starts = torch.zeros(len(sequences) + 1, dtype=torch.int64)
        starts[1:] = lengths.cumsum(0)
        firsts = torch.tensor(offsets)
        positions = torch.arange(int(starts[-1])) + (firsts - starts[:-1]).repeat_interleave(lengths)
        tokens = torch.cat([torch.as_tensor(ids, dtype=torch.int64, device="cpu") for ids in sequences])
        rows = torch.as_tensor(image_rows, dtype=torch.int64, device="cpu")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(tokens):
            raise ConfigError(f"image_rows={rows.tolist()} must be rows of the {len(tokens)} tokens")
        return cls(
            tokens.to(device),
            positions.to(device),
            starts,
            firsts,
            torch.tensor(list(slots)),
            torch.tensor(list(spans), dtype=torch.int64).reshape(-1, 2),
            rows.to(device),
        )

    @classmethod
    def rows(cls, tokens_BT: Tensor) -> Batch:
        """The rows of a rectangle of tokens as B sequences of T."""
        rows, length = tokens_BT.shape
        batch = cls.of([range(length)] * rows)
        return replace(batch, tokens=tokens_BT.flatten(), positions=batch.positions.to(tokens_BT.device))

    def sequences(self) -> Iterator[tuple[int, int, int, int]]:
        """(first row, end row, state slot, position of the first row) of each sequence. Waits for no device."""
        starts = self.starts.tolist()
        yield from zip(starts[:-1], starts[1:], self.slots.tolist(), self.offsets.tolist(), strict=True)

    def span_rows(self) -> list[tuple[int, int]]:
        """(first row, end row) of each span. Waits for no device."""
        return [(first, end) for first, end in self.spans.tolist()]

    def expect_features(self, features_ED: Tensor | None) -> None:
        """Check that there is a feature for every row that takes one. Waits for no device.

        Raises:
            ConfigError: if there are more, or fewer.
        """
        features = 0 if features_ED is None else features_ED.shape[0]
        if features != len(self.image_rows):
            raise ConfigError(f"{features} image features for {len(self.image_rows)} image_rows: must agree")

    def expect_causal(self) -> None:
        """Check that there are no spans, for layers that look back alone.

        Raises:
            ConfigError: if there are.
        """
        if len(self.spans):
            raise ConfigError(f"spans={self.spans.tolist()}: a recurrent layer cannot see what comes after")

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class Patches:
    """The rows of an image tower: those of one image after those of another, each image a sequence."""

    images: int
    per_image: int

    def sequences(self) -> Iterator[tuple[int, int, int, int]]:
        """As of a `Batch` in which each image is a sequence."""
        for image in range(self.images):
            yield image * self.per_image, (image + 1) * self.per_image, image, 0

    def span_rows(self) -> list[tuple[int, int]]:
        return []


# A batch is a tree of seven tensors to torch: a compiled function takes new boundaries as data, not as a new program.
_pytree.register_dataclass(Batch)
