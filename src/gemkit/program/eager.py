"""The torch executor: the modules as they stand, on any torch device. The reference that others are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from gemkit import family
from gemkit.errors import TextError
from gemkit.nn import Batch, Decoder, State

if TYPE_CHECKING:
    from typing import Protocol

    class Chunk(Protocol):
        """The next tokens of one sequence (`generate.Chunk`)."""

        @property
        def slot(self) -> int: ...
        @property
        def ids(self) -> Sequence[int]: ...
        @property
        def rows(self) -> int: ...


class Eager:
    """Runs a `nn.Decoder` chunk by chunk, without recording gradients."""

    name = "torch"

    def __init__(self, module: Decoder):
        self.module = module.eval()
        self.device = module.norm.weight.device

    @property
    def decoder(self) -> family.Decoder:
        return self.module.config

    def new_state(self, slots: int, room: int = 0) -> State:
        return self.module.new_state(slots, room)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], state: State) -> np.ndarray:
        """Compute the chunks, which continue what `state` remembers of their slots.

        Returns:
            float32 logits (R, V): for each chunk in order, those of its last `rows` tokens.

        Raises:
            TextError: if a token id is outside the vocabulary.
        """
        limit = self.decoder.vocab_size
        for chunk in chunks:
            if not 0 <= min(chunk.ids) <= max(chunk.ids) < limit:
                raise TextError(
                    f"token ids run from 0 to {limit - 1}; the prompt has {min(chunk.ids)} to {max(chunk.ids)}"
                )
        slots = [chunk.slot for chunk in chunks]
        batch = Batch.of(
            [chunk.ids for chunk in chunks],
            offsets=[state.lengths[slot] for slot in slots],
            slots=slots,
            device=self.device,
        )
        ends = batch.starts[1:].tolist()
        wanted = [row for end, chunk in zip(ends, chunks, strict=True) for row in range(end - chunk.rows, end)]
        logits_RV = self.module(batch, state, torch.tensor(wanted, dtype=torch.int64, device=self.device))
        return logits_RV.float().cpu().numpy()
