"""The memory of sequences between calls: a KV cache and recurrent states, explicit, never kept on a module.

    state = model.new_state(slots=2)
    logits = model(Batch.of([prompt_a, prompt_b]), state)
    snapshot = state.snapshot(0)
    logits = model(Batch.of([draft], offsets=[state.lengths[0]], slots=[0]), state)
    state.restore(snapshot, 0)                   # as if the draft had never been
    other = state.restore(snapshot)              # a slot of its own that goes on from there

A state has slots, one a sequence, and one entry a layer by the layer's kind. Callers know nothing of how the entries
store what they store. A snapshot is immutable and shares memory with slots and other snapshots. Keys are remembered
after rotation, with absolute positions, so nothing is ever rotated again. A forward pass that dies on its way leaves
the state as it was: tokens count when all layers have them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemkit import family
from gemkit.errors import StateError
from gemkit.nn import state_file
from gemkit.nn.state_file import Tensors

Sequences = Iterable[tuple[int, int, int, int]]  # of a batch: first row, end row, slot, position of the first row


@dataclass(eq=False)
class _Buffer:
    """Keys and values of consecutive positions of one sequence, with room to grow at the end.

    One slot at most writes to it, and never before `shared`: those rows belong to snapshots.
    """

    k_CKH: Tensor
    v_CKH: Tensor
    first: int  # position of row 0
    writer: int | None = None
    shared: int = 0

    @property
    def nbytes(self) -> int:
        return self.k_CKH.nbytes + self.v_CKH.nbytes

    def rows(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """The keys and values of these positions."""
        rows = slice(first - self.first, end - self.first)
        return self.k_CKH[rows], self.v_CKH[rows]


@dataclass(frozen=True, eq=False)
class _KeysValues:
    """An attention layer's memory of one sequence: the rows of a buffer before position `end`."""

    memory: _Buffer
    end: int

    def tensors(self) -> Tensors:
        keys, values = self.memory.rows(self.memory.first, self.end)
        return {"keys": keys, "values": values}


class KVCache:
    """The KV cache of one attention layer: every position, or those that the window of a coming token can reach.

    A sliding layer keeps `window - 1` positions when it moves to a new buffer. That copies this many rows once every
    `window` tokens or so, and in between a read is a view: the rows are always in the order of their positions.
    """

    def __init__(self, mixer: family.Attention):
        self._heads = (mixer.kv_heads, mixer.head_dim)
        self._before, _ = mixer.visible
        self._held: dict[int, _KeysValues] = {}

    def append(self, slot: int, position: int, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Remember the tokens from `position` on; whatever was there from `position` on is forgotten."""
        _refuse_gradients(k_TKH, v_TKH)
        held, new = self._held.get(slot), len(k_TKH)
        if held is None:
            held = _KeysValues(_Buffer(k_TKH[:0], v_TKH[:0], position), position)
        assert position <= held.end, "a gap in a sequence"
        buffer = held.memory
        if self._fits(slot, buffer, position, new):
            buffer.writer = slot
        else:
            self._leave(slot)
            first, capacity = self._layout(buffer, position, new)
            kept = buffer.rows(first, position)
            k_CKH, v_CKH = (_extended(rows, capacity) for rows in kept)
            buffer = _Buffer(k_CKH, v_CKH, first, writer=slot)
        keys, values = buffer.rows(position, position + new)
        keys.copy_(k_TKH)
        values.copy_(v_TKH)
        self._held[slot] = _KeysValues(buffer, position + new)

    def read(self, slot: int) -> tuple[Tensor, Tensor, int]:
        """Keys and values (S, K, H), and the position of the first of them."""
        held = self._held[slot]
        return *held.memory.rows(held.memory.first, held.end), held.memory.first

    def commit(self, slot: int) -> None:
        """No-op: the next tokens write over what a broken step left behind their position."""

    def hold(self, slot: int, length: int) -> _KeysValues:
        """The first `length` tokens of `slot`, from now on protected from its writer."""
        buffer = self._held[slot].memory
        buffer.shared = max(buffer.shared, length)
        return _KeysValues(buffer, length)

    def put(self, slot: int, held: _KeysValues, keep: int) -> None:
        """Let `slot` remember this, and the first `keep` tokens that it has appended since (`can_keep`)."""
        length, now = held.end + keep, self._held.get(slot)
        if keep and now is not None:
            if now.memory is held.memory or now.memory.first <= self._first_seen(length):
                self._held[slot] = _KeysValues(now.memory, length)
                return
            first = min(self._first_seen(length), held.end)  # of two buffers: what was before, and what is kept
            parts = zip(held.memory.rows(first, held.end), now.memory.rows(held.end, length), strict=True)
            k_SKH, v_SKH = (torch.cat(pair) for pair in parts)
            held = _KeysValues(_Buffer(k_SKH, v_SKH, first), length)
        self._leave(slot)
        self._held[slot] = held

    def can_keep(self, slot: int, held: _KeysValues, keep: int) -> bool:
        """True if the buffers of both still have all that a token after the kept ones sees."""
        now = self._held[slot].memory
        return now is held.memory or now.first <= max(self._first_seen(held.end + keep), held.end)

    def free(self, slot: int) -> None:
        self._leave(slot)
        self._held.pop(slot, None)

    def held(self, slot: int) -> _Buffer | None:
        return self._held[slot].memory if slot in self._held else None

    def needed(self, slot: int, length: int, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of a new buffer, if the next `tokens` of a slot with `length` do not fit into the one it has."""
        row, held = 2 * self._heads[0] * self._heads[1] * dtype.itemsize, self._held.get(slot)
        if held is not None and self._fits(slot, held.memory, length, tokens):
            return 0
        empty = torch.empty(0)
        buffer = _Buffer(empty, empty, length) if held is None else held.memory
        return row * self._layout(buffer, length, tokens)[1]

    def loaded(self, length: int, tensors: Tensors, dtype: torch.dtype, where: str) -> _KeysValues:
        """The memory of `length` tokens from the tensors of a file.

        Raises:
            StateError: if they cannot be that.
        """
        state_file.expect_names(tensors, ("keys", "values"), where)
        keys, values = tensors["keys"], tensors["values"]
        count = keys.shape[0] if keys.ndim else 0
        least = length - self._first_seen(length)
        if not least <= count <= length:
            raise StateError(f"{where}: holds {count} of {length} positions, must hold {least} at least")
        for name, tensor in tensors.items():
            state_file.expect(tensor, (count, *self._heads), dtype, f"{where}.{name}")
        return _KeysValues(_Buffer(keys, values, length - count, shared=length), length)

    def _fits(self, slot: int, buffer: _Buffer, position: int, new: int) -> bool:
        mine = buffer.writer in (None, slot) and position >= buffer.shared
        return mine and position - buffer.first + new <= len(buffer.k_CKH)

    def _layout(self, buffer: _Buffer, position: int, new: int) -> tuple[int, int]:
        """Of a new buffer for `new` tokens from `position` on: its first position, and its rows, with room beyond."""
        first = max(buffer.first, self._first_seen(position))
        kept = position - first
        # twice the window, or half as much again, makes the cost of copying a constant per token
        spare = max(256, kept // 2) if self._before is None else self._before + 1
        return first, kept + max(new, spare)

    def _first_seen(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        return 0 if self._before is None else max(0, position - self._before)

    def _leave(self, slot: int) -> None:
        held = self._held.get(slot)
        if held is not None and held.memory.writer == slot:
            held.memory.writer = None


@dataclass(frozen=True, eq=False)
class _Point:
    """A recurrent layer's memory of one sequence. Its tensors are never written to, so that snapshots share them."""

    tail_CR: Tensor  # last inputs of the convolution, in the run dtype
    hidden_R: Tensor  # float32

    @property
    def memory(self) -> _Point:
        return self

    @property
    def nbytes(self) -> int:
        return self.tail_CR.nbytes + self.hidden_R.nbytes

    def tensors(self) -> Tensors:
        return {"tail": self.tail_CR, "hidden": self.hidden_R}


class RecurrentState:
    """The memory of one recurrent layer: its state after the last token, of a size that never changes.

    A step replaces the state, so what it leaves waits beside it until `commit`.
    """

    def __init__(self, mixer: family.Recurrent):
        self._mixer = mixer
        self._points: dict[int, _Point] = {}
        self._tails: dict[int, Tensor] = {}
        self._hiddens: dict[int, Tensor] = {}

    def tail(self, slot: int) -> Tensor | None:
        """The last inputs of the convolution (C - 1, R), oldest first; None before the first token."""
        point = self._points.get(slot)
        return point and point.tail_CR

    def hidden(self, slot: int) -> Tensor | None:
        """The hidden state (R,) float32; None before the first token."""
        point = self._points.get(slot)
        return point and point.hidden_R

    def keep_tail(self, slot: int, tail_CR: Tensor) -> None:
        _refuse_gradients(tail_CR)
        self._tails[slot] = tail_CR

    def keep_hidden(self, slot: int, hidden_R: Tensor) -> None:
        _refuse_gradients(hidden_R)
        self._hiddens[slot] = hidden_R

    def commit(self, slot: int) -> None:
        """The step is over: what it left is the state."""
        self._points[slot] = _Point(self._tails.pop(slot), self._hiddens.pop(slot))

    def hold(self, slot: int, _: int) -> _Point:
        return self._points[slot]

    def put(self, slot: int, held: _Point, _: int) -> None:
        self._points[slot] = held

    def can_keep(self, *_: Any) -> bool:
        """Never: a recurrence can only be again what it was when it was held."""
        return False

    def free(self, slot: int) -> None:
        for held in (self._points, self._tails, self._hiddens):
            held.pop(slot, None)

    def held(self, slot: int) -> _Point | None:
        return self._points.get(slot)

    def needed(self, slot: int, _: int, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of a state; one that is replaced is given back, unless a snapshot holds it: counted by `State`."""
        return self._mixer.width * ((self._mixer.conv_width - 1) * dtype.itemsize + torch.float32.itemsize)

    def loaded(self, _: int, tensors: Tensors, dtype: torch.dtype, where: str) -> _Point:
        """The memory from the tensors of a file; a StateError for those that cannot be this layer's."""
        state_file.expect_names(tensors, ("tail", "hidden"), where)
        point = _Point(tensors["tail"], tensors["hidden"])
        state_file.expect(point.tail_CR, (self._mixer.conv_width - 1, self._mixer.width), dtype, f"{where}.tail")
        state_file.expect(point.hidden_R, (self._mixer.width,), torch.float32, f"{where}.hidden")
        return point


class Snapshot:
    """The memory of one sequence at one moment. Immutable; it shares memory with slots and other snapshots."""

    def __init__(self, decoder: family.DecoderConfig, length: int, layers: tuple[_KeysValues | _Point, ...]):
        self.decoder, self.length, self.layers = decoder, length, layers

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, which appears under its name only when it is complete.

        It holds a tensor for each kind of thing that a layer remembers, and a manifest in its header. It belongs to a
        model of this architecture with the same weights; the architecture is checked when it is read.

        Raises:
            StateError: if it cannot be written.
        """
        tensors = {f"{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.tensors().items()}
        return state_file.write(Path(path).expanduser(), self.decoder, self.length, tensors)


class State:
    """The memory of a decoder: slots, one a sequence, that come and go.

    Args:
        decoder: the architecture; a state serves this one only.
        slots: added to begin with, from 0 on.
        dtype: that the model runs in.
        device: where a snapshot is loaded to.
    """

    def __init__(
        self,
        decoder: family.DecoderConfig,
        slots: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if slots < 0:
            raise StateError(f"slots={slots} must be at least 0")
        self.decoder, self._dtype, self._device = decoder, dtype, device
        self.lengths = dict.fromkeys(range(slots), 0)  # tokens remembered by each live slot: layers may hold fewer
        self.layers: list[Any] = [_entry(layer.mixer) for layer in decoder.layers]
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self._before: dict[int, weakref.WeakSet[Snapshot]] = {slot: weakref.WeakSet() for slot in self.lengths}

    def add(self) -> int:
        """A new, empty slot: the lowest number that is free."""
        slot = next(slot for slot in range(len(self.lengths) + 1) if slot not in self.lengths)
        self.lengths[slot], self._before[slot] = 0, weakref.WeakSet()
        return slot

    def free(self, slot: int) -> None:
        """End a slot; what no snapshot and no other slot shares with it is given back."""
        self._checked(slot)
        for entry in self.layers:
            entry.free(slot)
        del self.lengths[slot], self._before[slot]

    @property
    def nbytes(self) -> int:
        """Bytes held by slots and snapshots, spare room of buffers included and shared memory counted once."""
        return sum({id(memory): memory.nbytes for _, memory in self._holders()}.values())

    def unique(self, held: object, /) -> int:
        """Bytes that freeing this slot, or dropping this snapshot, would give back."""
        if isinstance(held, int):
            self._checked(held)
        elif not (isinstance(held, Snapshot) and held in self._snapshots):
            raise StateError("neither a slot nor a snapshot of this state")
        sizes: dict[int, int] = {}
        others: set[int] = set()
        for holder, memory in self._holders():
            if holder is held or (isinstance(holder, int) and holder == held):
                sizes[id(memory)] = memory.nbytes
            else:
                others.add(id(memory))
        return sum(size for number, size in sizes.items() if number not in others)

    def needed(self, slot: int, tokens: int) -> int:
        """Bytes that a chunk of this many tokens would newly take, copies of shared memory included."""
        length, total = self.lengths[self._checked(slot)], 0
        shared = {id(memory) for holder, memory in self._holders() if holder != slot}
        for entry in self.layers:
            held = entry.held(slot)
            if isinstance(entry, KVCache) or held is None or id(held) in shared:
                total += entry.needed(slot, length, tokens, self._dtype)
        return total

    def snapshot(self, slot: int) -> Snapshot:
        """The memory of a slot as it is now."""
        length = self.lengths[self._checked(slot)]
        layers = tuple(entry.hold(slot, length) for entry in self.layers) if length else ()
        made = Snapshot(self.decoder, length, layers)
        self._snapshots.add(made)
        self._before[slot].add(made)
        return made

    def restore(self, snapshot: object, slot: int | None = None, *, keep: int = 0) -> int:
        """Put what a snapshot holds into a new slot (None), or in place of what `slot` holds.

        Args:
            keep: of the tokens that `slot` computed since the snapshot was taken of it, the first `keep` stay, where
                every layer can keep them: a recurrent layer cannot, and one with a window only while it has all that
                the next token sees. Else none stays; `lengths` say it.

        Returns:
            the slot.

        Raises:
            StateError: if the snapshot is of another state, or `slot` has not computed `keep` tokens since. Nothing has
                changed then.
        """
        if not isinstance(snapshot, Snapshot) or snapshot not in self._snapshots:
            raise StateError("no snapshot of this state: take it with state.snapshot(slot), or state.load(path)")
        if slot is None:
            if keep:
                raise StateError(f"keep={keep} in a new slot, which has computed nothing since the snapshot was taken")
            slot = self.add()
        length = snapshot.length + keep
        continues = snapshot in self._before[self._checked(slot)]
        if keep and not (keep > 0 and continues and length <= self.lengths[slot]):
            raise StateError(
                f"slot {slot} holds {self.lengths[slot]} tokens and cannot keep {keep} after the snapshot's "
                f"{snapshot.length}" + ("" if continues else ", which was not taken of them")
            )
        if not snapshot.length:
            keep = 0
        held = list(zip(self.layers, snapshot.layers, strict=snapshot.length > 0))
        if not all(entry.can_keep(slot, layer, keep) for entry, layer in held if keep):
            keep = 0
        if not snapshot.length:
            for entry in self.layers:
                entry.free(slot)
        for entry, layer in held:
            entry.put(slot, layer, keep)
        self.lengths[slot] = snapshot.length + keep
        known = [s for s in self._before[slot] if s.length <= self.lengths[slot]] if continues else []
        self._before[slot] = weakref.WeakSet([*known, snapshot])
        return slot

    def load(self, path: str | os.PathLike[str]) -> Snapshot:
        """A snapshot that was saved, in this process or another.

        Raises:
            StateError: if the file is damaged, none of ours, or of another architecture or dtype.
        """
        length, tensors = state_file.read(Path(path).expanduser(), self.decoder)
        layers = []
        for i, entry in enumerate(self.layers if length else ()):
            names = [name for name in tensors if name.startswith(f"{i}.")]
            found = {name.removeprefix(f"{i}."): tensors.pop(name).to(self._device) for name in names}
            layers.append(entry.loaded(length, found, self._dtype, f"{path}: layer {i}"))
        if tensors:
            raise StateError(f"{path}: {next(iter(tensors))} belongs nowhere")
        made = Snapshot(self.decoder, length, tuple(layers))
        self._snapshots.add(made)
        return made

    def expect(self, decoder: family.DecoderConfig, sequences: Sequences) -> None:
        """Check that new tokens continue what is remembered, before any layer is touched."""
        if decoder != self.decoder:
            raise StateError("this state was made for another model: make one with model.new_state()")
        for _, _, slot, position in sequences:
            if position != self.lengths[self._checked(slot)]:
                raise StateError(
                    f"slot {slot} remembers {self.lengths[slot]} tokens but the batch continues at position {position}"
                )

    def advance(self, sequences: Sequences) -> None:
        """All layers have these tokens: they count from now on. An interrupted forward pass never gets here, and the
        next one writes over what it left."""
        for first, end, slot, _ in sequences:
            for entry in self.layers:
                entry.commit(slot)
            self.lengths[slot] += end - first

    def _holders(self) -> Iterator[tuple[int | Snapshot, _Buffer | _Point]]:
        """Each slot and each living snapshot with the memory that it holds, layer by layer."""
        for slot in self.lengths:
            for entry in self.layers:
                if (memory := entry.held(slot)) is not None:
                    yield slot, memory
        for snapshot in self._snapshots:
            for layer in snapshot.layers:
                yield snapshot, layer.memory

    def _checked(self, slot: int) -> int:
        if slot not in self.lengths:
            raise StateError(f"slot {slot} of a state with slots {sorted(self.lengths)}")
        return slot


def _entry(mixer: family.Mixer) -> KVCache | RecurrentState:
    return RecurrentState(mixer) if isinstance(mixer, family.Recurrent) else KVCache(mixer)


def _extended(rows: Tensor, capacity: int) -> Tensor:
    """A copy with room for `capacity` rows."""
    buffer = rows.new_empty((capacity, *rows.shape[1:]))
    buffer[: len(rows)] = rows
    return buffer


def _refuse_gradients(*tensors: Tensor) -> None:
    if any(tensor.requires_grad for tensor in tensors):
        raise StateError(
            "a State was handed to a forward pass that records gradients: train without a State, "
            "or run under torch.inference_mode()"
        )
