"""The torch executor: the modules as they stand, on any torch device. The reference that others are tested against."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gemkit import family
from gemkit.errors import ModelError, StateError, Stopped
from gemkit.executors.interface import (
    Chunk,
    Output,
    Outputs,
    SparseLogits,
    StopFlag,
    check_ids,
    image_rows,
    pool,
    span_rows,
)
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
        self._turn = threading.Lock()

    @property
    def decoder(self) -> family.DecoderConfig:
        return self.module.config

    def about(self) -> str:
        """How it computes, for people."""
        kernel, reason = attention_kernel(next((m.softcap for m in self.decoder.attention if m.softcap), None))
        return f"on {self.device}; attention {kernel}: {reason}"

    def new_state(self, slots: int = 0) -> State:
        return self.module.new_state(slots)

    @torch.inference_mode()
    def run(
        self, chunks: Sequence[Chunk], state: object, *, output: Output = "logits", stop: StopFlag | None = None
    ) -> Outputs:
        """Compute the chunks, which continue what `state` remembers of their slots.

        Calls of several threads take turns. `stop` is looked at before each block, a tower's too.

        Raises:
            TextError: if a token id is outside the vocabulary.
            ConfigError: if images and the placeholders among the ids do not match, images are of another resolution
                than the tower, or a chunk cuts a span.
            ModelError: if a reward is asked of a model without a score head.
            StateError: if the state is of another executor, or has no such slot.
            Stopped: if `stop` was set.
        """
        if not isinstance(state, State):
            raise StateError(f"{type(state).__name__} is no state of this executor: make one with new_state()")
        if output == "reward" and self.module.score is None:
            raise ModelError("the model has no reward head: `gemkit tune reward` trains one")
        check_ids([token for chunk in chunks for token in chunk.ids], self.decoder)
        images = [image for chunk in chunks for image in chunk.images]
        # what a module takes beside a batch: pixels, of a tower alone
        options: dict[str, Any] = {"output": "hidden" if output == "pooled" else output}
        if images:
            options["pixels_ICSS"] = torch.from_numpy(np.stack(images)).to(self.device)
        with self._turn, _stopped_by(stop, self.module):
            batch = self._batch(chunks, state)
            ends = batch.starts[1:].tolist()
            wanted = [row for end, chunk in zip(ends, chunks, strict=True) for row in range(end - chunk.rows, end)]
            rows = torch.tensor(wanted, dtype=torch.int64, device=self.device)
            found = self.module(batch, state, rows, **options).float().cpu().numpy()
        match output:
            case "logits":
                of = [chunk for chunk in chunks for _ in range(chunk.rows)]
                computed = np.full(len(found), self.decoder.vocab_size, np.int64)
                return Outputs([_filtered(row, chunk) for row, chunk in zip(found, of, strict=True)], computed)
            case "pooled":
                return pool(found, chunks)
        return Outputs([np.atleast_1d(row) for row in found], np.zeros(len(found), np.int64))

    def _batch(self, chunks: Sequence[Chunk], state: State) -> Batch:
        for chunk in chunks:
            if chunk.slot not in state.lengths:
                raise StateError(f"slot {chunk.slot} of a state with slots {sorted(state.lengths)}")
        slots = [chunk.slot for chunk in chunks]
        return Batch.of(
            [chunk.ids for chunk in chunks],
            offsets=[state.lengths[slot] for slot in slots],
            slots=slots,
            spans=span_rows(chunks, state.lengths),
            image_rows=image_rows(chunks, self.module.vision),
            device=self.device,
        )


@contextmanager
def _stopped_by(stop: StopFlag | None, module: LanguageModel) -> Iterator[None]:
    """Raises: Stopped, before the next block once the flag is set."""
    if stop is None:
        yield
        return

    def look(*_: Any) -> None:
        if stop.is_set():
            raise Stopped("the call was ended by its stop flag; its state is as before")

    look()
    handles = [block.register_forward_pre_hook(look) for block in module.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _filtered(logits_V: np.ndarray, chunk: Chunk) -> np.ndarray | SparseLogits:
    """A row through the chunk's filter, if it has one; a row with NaN whole, for the sampler to refuse."""
    if (some := chunk.filter) is None or np.isnan(logits_V).any():
        return logits_V
    counted = logits_V.copy()
    counted[some.always] = -np.inf
    top_n = min(max(some.top_n, 1), len(counted))
    least = float(np.partition(counted, -top_n)[-top_n])
    if some.max_gap is not None:
        least -= some.max_gap + 1e-5 * (1 + abs(least))  # what rounding would put at the border is kept
    kept = counted >= least
    kept[some.always] = True
    ids = np.flatnonzero(kept)
    return SparseLogits(ids, logits_V[ids])
