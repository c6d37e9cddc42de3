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

    def __post_init__(self):
        """Raises: ConfigError, if the boundaries do not cut the tokens into sequences of at least one."""
        starts, rows = self.starts, len(self.tokens)
        if len(starts) < 2 or starts[0] != 0 or starts[-1] != rows or not (starts[1:] > starts[:-1]).all():
            raise ConfigError(f"starts={starts.tolist()} must rise from 0 to the number of tokens, {rows}")
        if len(self.positions) != rows or not len(self.slots) == len(self.offsets) == len(starts) - 1:
            raise ConfigError(
                f"{rows} tokens in {len(starts) - 1} sequences, but {len(self.positions)} positions, "
                f"{len(self.offsets)} offsets and {len(self.slots)} slots: must agree"
            )

    @classmethod
    def of(
        cls,
        sequences: Sequence[Sequence[int] | Tensor],
        *,
        offsets: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Batch:
        """Lay sequences end to end.

        Args:
            sequences: the new token ids of each.
            offsets: position of each one's first token (default: all 0).
            slots: state slot of each (default: 0, 1, 2, ...).
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
        return cls(tokens.to(device), positions.to(device), starts, firsts, torch.tensor(list(slots)))

    @classmethod
    def rows(cls, tokens_BT: Tensor) -> Batch:
        """The rows of a rectangle of tokens as B sequences of T."""
        rows, length = tokens_BT.shape
        batch = cls.of([range(length)] * rows)
        return replace(batch, tokens=tokens_BT.flatten(), positions=batch.positions.to(tokens_BT.device))

    def spans(self) -> Iterator[tuple[int, int, int, int]]:
        """(first row, end row, state slot, position of the first row) of each sequence. Waits for no device."""
        starts = self.starts.tolist()
        yield from zip(starts[:-1], starts[1:], self.slots.tolist(), self.offsets.tolist(), strict=True)

    def __len__(self) -> int:
        return self.tokens.shape[0]


# A batch is a tree of five tensors to torch: a compiled function takes new boundaries as data, not as a new program.
_pytree.register_dataclass(Batch)
