"""The torch executor: the modules as they stand, on any torch device. The reference that others are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gemkit import family
from gemkit.executors.interface import Chunk, Output, Outputs, StopFlag, check_ids, image_rows, span_rows
from gemkit.executors.native import dequantize
from gemkit.nn import Batch, LanguageModel, State
from gemkit.ops import attention_kernel

dequantize.enable()


class TorchExecutor:
    """Runs a `nn.LanguageModel` chunk by chunk, without recording gradients."""

    name = "torch"

    def __init__(self, module: LanguageModel):
        self.module = module.eval()
        self.device = module.device

    @property
    def decoder(self) -> family.DecoderConfig:
        return self.module.config

    def about(self) -> str:
        """How it computes, for people."""
        kernel, reason = attention_kernel(next((m.softcap for m in self.decoder.attention if m.softcap), None))
        return f"on {self.device}; attention {kernel}: {reason}"

    def new_state(self, slots: int = 0, room: int = 0) -> Any:
        return self.module.new_state(slots, room)

    @torch.inference_mode()
    def run(
        self, chunks: Sequence[Chunk], state: State, *, output: Output = "logits", stop: StopFlag | None = None
    ) -> Outputs:
        """Compute the chunks, which continue what `state` remembers of their slots.

        Raises:
            TextError: if a token id is outside the vocabulary.
            ConfigError: if images and the placeholders among the ids do not match, images are of another resolution
                than the tower, or a chunk cuts a span.
        """
        check_ids([token for chunk in chunks for token in chunk.ids], self.decoder)
        slots = [chunk.slot for chunk in chunks]
        batch = Batch.of(
            [chunk.ids for chunk in chunks],
            offsets=[state.lengths[slot] for slot in slots],
            slots=slots,
            spans=span_rows(chunks, state.lengths),
            image_rows=image_rows(chunks, self.module.vision),
            device=self.device,
        )
        ends = batch.starts[1:].tolist()
        wanted = [row for end, chunk in zip(ends, chunks, strict=True) for row in range(end - chunk.rows, end)]
        rows = torch.tensor(wanted, dtype=torch.int64, device=self.device)
        images = [image for chunk in chunks for image in chunk.images]
        if images:
            pixels_ICSS = torch.from_numpy(np.stack(images)).to(self.device)
            logits_RV = self.module(batch, state, rows, pixels_ICSS=pixels_ICSS)
        else:
            logits_RV = self.module(batch, state, rows)
        logits = logits_RV.float().cpu().numpy()
        return Outputs(list(logits), np.full(len(logits), self.decoder.vocab_size))
