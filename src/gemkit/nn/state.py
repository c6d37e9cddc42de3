"""What a model remembers of sequences between calls: explicit, handed in and out, never kept on a module.

    state = model.new_state(slots=2)
    logits = model(Batch.of([prompt_a, prompt_b]), state)
    mark = state.mark(0)
    logits = model(Batch.of([draft], offsets=state.lengths[:1], slots=[0]), state)
    state.rollback(mark)                         # as if the draft had never been

A state has `slots`, one a sequence, and one entry a layer by the layer's kind. Callers know nothing of how the entries
store what they store. Keys are remembered after rotation, with absolute positions, so nothing is ever rotated again.
A forward pass that dies on its way leaves the state as it was: tokens count when all layers have them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemkit import family
from gemkit.errors import StateError
from gemkit.files import atomic_file, write_safetensors

Span = tuple[int, int, int, int]  # of a batch: first row, end row, state slot, position of the first row
Tensors = dict[str, Tensor]


@dataclass
class _Span:
    """Keys and values of consecutive positions of one sequence, in buffers with room to grow at the end."""

    k_CKH: Tensor
    v_CKH: Tensor
    first: int  # position of row 0
    count: int  # rows in use

    @property
    def end(self) -> int:
        return self.first + self.count


class KVCache:
    """What one attention layer remembers: every position, or those that the window of a coming token can reach.

    A sliding layer keeps `window - 1 + room` positions when its buffer is compacted, where `room` is how many tokens
    may be taken back. Compaction copies that many rows once every `window` tokens or so, and in between a read is a
    view: the rows are always in the order of their positions.
    """

    def __init__(self, slots: int, heads: tuple[int, int], window: int | None, room: int):
        self._heads = heads  # (K, H)
        self._window = window
        self._room = room
        self._spans: list[_Span | None] = [None] * slots

    def append(self, slot: int, position: int, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Remember the tokens from `position` on; whatever was there from `position` on is forgotten."""
        _refuse_gradients(k_TKH, v_TKH)
        span = self._spans[slot]
        if span is None:
            span = _Span(k_TKH[:0], v_TKH[:0], position, 0)
        self._cut(span, position)
        new = k_TKH.shape[0]
        if span.count + new > span.k_CKH.shape[0]:
            span = self._grown(span, new)
        self._spans[slot] = span
        span.k_CKH[span.count : span.count + new] = k_TKH
        span.v_CKH[span.count : span.count + new] = v_TKH
        span.count += new

    def read(self, slot: int) -> tuple[Tensor, Tensor, int]:
        """Keys and values (S, K, H), and the position of the first of them."""
        span = self._spans[slot]
        assert span is not None, "read before append"
        return span.k_CKH[: span.count], span.v_CKH[: span.count], span.first

    def commit(self, slot: int) -> None:
        """Nothing is to do: the next tokens write over what a broken step left behind their position."""

    def mark(self, slot: int) -> None:
        """Nothing is to be held: going back is to forget the end."""

    def check(self, slot: int, length: int) -> None:
        """Refuse to go back to `length` tokens if what their next token must see was dropped."""
        span = self._spans[slot]
        if span is not None and length < span.end:
            self._cut(_Span(span.k_CKH, span.v_CKH, span.first, span.count), length)

    def rollback(self, slot: int, length: int, _: None) -> None:
        span = self._spans[slot]
        if span is not None and length < span.end:
            self._cut(span, length)

    def fork(self, source: int, target: int) -> None:
        span = self._spans[source]
        self._spans[target] = span and _Span(span.k_CKH.clone(), span.v_CKH.clone(), span.first, span.count)

    def free(self, slot: int) -> None:
        self._spans[slot] = None

    @property
    def nbytes(self) -> int:
        return sum(s.k_CKH.nbytes + s.v_CKH.nbytes for s in self._spans if s is not None)

    def dump(self, slot: int, length: int) -> Tensors:
        """The rows in use for `length` tokens; their positions end there."""
        span = self._spans[slot]
        assert span is not None
        count = length - span.first
        return {"keys": span.k_CKH[:count], "values": span.v_CKH[:count]}

    def restore(self, slot: int, length: int, tensors: Tensors, where: str) -> None:
        """Remember what was dumped.

        Raises:
            StateError: if these tensors cannot be the memory of `length` tokens.
        """
        k_SKH, v_SKH = _take(tensors, ("keys", "values"), where)
        count = k_SKH.shape[0] if k_SKH.ndim else 0
        least = length - self._needed(length)
        if not least <= count <= length:
            raise StateError(f"{where}: holds {count} of {length} positions, must hold {least} at least")
        for name, tensor in (("keys", k_SKH), ("values", v_SKH)):
            _expect(tensor, (count, *self._heads), k_SKH.dtype, f"{where}.{name}")
        self._spans[slot] = _Span(k_SKH, v_SKH, length - count, count)

    def _needed(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        return 0 if self._window is None else max(0, position - self._window + 1)

    def _cut(self, span: _Span, position: int) -> None:
        if span.first > self._needed(position):
            raise StateError(
                f"cannot go back to position {position}: a layer with a window of {self._window} has dropped "
                f"positions before {span.first}; make the state with room={span.end - position} or more"
            )
        assert position <= span.end, "a gap in a sequence"
        span.count = position - span.first

    def _grown(self, span: _Span, new: int) -> _Span:
        """A copy of what must be kept, in a buffer with room for `new` rows and a while beyond."""
        drop = 0
        if self._window is not None:
            drop = max(0, span.count - (self._window - 1 + self._room))
        kept = span.count - drop
        # twice the window, or half as much again, makes the cost of copying a constant per token
        capacity = kept + max(new, self._window or max(256, kept // 2))
        buffers = []
        for old in (span.k_CKH, span.v_CKH):
            buffer = old.new_empty((capacity, *old.shape[1:]))
            buffer[:kept] = old[drop : span.count]
            buffers.append(buffer)
        return _Span(buffers[0], buffers[1], span.first + drop, kept)


@dataclass(frozen=True)
class _Point:
    """A recurrent layer at one position of a sequence. Its tensors are never written to, so that copies share them."""

    tail_CR: Tensor  # last inputs of the convolution, in the run dtype
    hidden_R: Tensor  # float32


class Recurrence:
    """What one recurrent layer remembers: its state after the last token, of a size that never changes.

    A step replaces the state, so what it leaves waits beside it until `commit`.
    """

    def __init__(self, slots: int, layer: family.Recurrent):
        self._layer = layer
        self._points: list[_Point | None] = [None] * slots
        self._tails: dict[int, Tensor] = {}
        self._hiddens: dict[int, Tensor] = {}

    def tail(self, slot: int) -> Tensor | None:
        """The last inputs of the convolution (C - 1, R), oldest first; None before the first token."""
        point = self._points[slot]
        return point and point.tail_CR

    def hidden(self, slot: int) -> Tensor | None:
        """The hidden state (R,) float32; None before the first token."""
        point = self._points[slot]
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

    def mark(self, slot: int) -> _Point | None:
        return self._points[slot]

    def check(self, slot: int, length: int) -> None:
        """Every mark can be gone back to: it holds the state itself."""

    def rollback(self, slot: int, _: int, point: _Point | None) -> None:
        self._points[slot] = point

    def fork(self, source: int, target: int) -> None:
        self._points[target] = self._points[source]

    def free(self, slot: int) -> None:
        self._points[slot] = None

    @property
    def nbytes(self) -> int:
        return sum(point.tail_CR.nbytes + point.hidden_R.nbytes for point in self._points if point is not None)

    def dump(self, slot: int, _: int) -> Tensors:
        point = self._points[slot]
        assert point is not None
        return {"tail": point.tail_CR, "hidden": point.hidden_R}

    def restore(self, slot: int, _: int, tensors: Tensors, where: str) -> None:
        """Remember what was dumped; refuse with a StateError what cannot be this layer's."""
        tail_CR, hidden_R = _take(tensors, ("tail", "hidden"), where)
        _expect(tail_CR, (self._layer.conv_width - 1, self._layer.width), tail_CR.dtype, f"{where}.tail")
        _expect(hidden_R, (self._layer.width,), torch.float32, f"{where}.hidden")
        self._points[slot] = _Point(tail_CR, hidden_R)


@dataclass(frozen=True)
class Mark:
    """A place to come back to."""

    slot: int
    length: int
    entries: tuple[Any, ...]  # what each layer needs to come back


class State:
    """The memory of a decoder for `slots` sequences.

    Args:
        decoder: the architecture; a state serves this one only.
        slots: sequences it can hold.
        room: how many tokens a `rollback` may take back at most; sliding layers keep that many more positions.
    """

    def __init__(self, decoder: family.DecoderConfig, slots: int, room: int = 0):
        if slots < 1 or room < 0:
            raise StateError(f"slots={slots} must be at least 1, and room={room} at least 0")
        self.decoder = decoder
        self.lengths = dict.fromkeys(range(slots), 0)  # tokens remembered in each slot: layers may hold fewer
        self.layers: list[Any] = [_entry(layer.mixer, slots, room) for layer in decoder.layers]
        self.room = room

    def mark(self, slot: int) -> Mark:
        """A place in `slot` that `rollback` returns to."""
        self._checked(slot)
        return Mark(slot, self.lengths[slot], tuple(entry.mark(slot) for entry in self.layers))

    def rollback(self, mark: Mark, keep: int = 0) -> None:
        """Forget everything since `mark`, but for its first `keep` tokens.

        A recurrent layer can only be again what it was at the mark: with one, those are forgotten as well. `lengths`
        say what was kept.

        Raises:
            StateError: if the slot has been shorter since, or a sliding layer had no `room` to keep what is needed.
                Nothing has changed then.
        """
        if any(isinstance(entry, Recurrence) for entry in self.layers):
            keep = 0
        length = mark.length + keep
        if length > self.lengths[self._checked(mark.slot)]:
            where = f"the mark is at {mark.length}" + (f", {keep} are to be kept after it" if keep else "")
            raise StateError(f"slot {mark.slot} holds {self.lengths[mark.slot]} tokens, {where}")
        for entry in self.layers:
            entry.check(mark.slot, length)
        for entry, held in zip(self.layers, mark.entries, strict=True):
            entry.rollback(mark.slot, length, held)
        self.lengths[mark.slot] = length

    def fork(self, source: int, target: int) -> None:
        """Make `target` remember what `source` does; the two go their own ways from here."""
        self._checked(source)
        self._checked(target)
        for entry in self.layers:
            entry.fork(source, target)
        self.lengths[target] = self.lengths[source]

    def free(self, slot: int) -> None:
        """Forget a sequence; the slot is as new."""
        self._checked(slot)
        for entry in self.layers:
            entry.free(slot)
        self.lengths[slot] = 0

    @property
    def nbytes(self) -> int:
        """Bytes held, the buffers' spare room included."""
        return sum(entry.nbytes for entry in self.layers)

    def expect(self, decoder: family.DecoderConfig, spans: Iterable[Span]) -> None:
        """Check that new tokens continue what is remembered, before any layer is touched."""
        if decoder != self.decoder:
            raise StateError("this state was made for another model: make one with model.new_state()")
        for _, _, slot, position in spans:
            if position != self.lengths[self._checked(slot)]:
                raise StateError(
                    f"slot {slot} remembers {self.lengths[slot]} tokens but the batch continues at position {position}"
                )

    def advance(self, spans: Iterable[Span]) -> None:
        """All layers have these tokens: they count from now on. An interrupted forward pass never gets here, and the
        next one writes over what it left."""
        for first, end, slot, _ in spans:
            for entry in self.layers:
                entry.commit(slot)
            self.lengths[slot] += end - first

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything that is remembered to one file, which appears under its name only when it is complete.

        It is a safetensors file: a tensor for each kind of thing that a layer remembers of a slot, in use only, and a
        manifest in its header. It belongs to a model of this architecture with the same weights; the architecture is
        checked when it is read.

        Raises:
            StateError: if it cannot be written.
        """
        target = Path(path).expanduser()
        tensors = {
            f"{slot}.{i}.{name}": tensor
            for slot, length in self.lengths.items()
            if length
            for i, entry in enumerate(self.layers)
            for name, tensor in entry.dump(slot, length).items()
        }
        manifest = {
            "version": _VERSION,
            "decoder": _fingerprint(self.decoder),
            "lengths": list(self.lengths.values()),
            "room": self.room,
        }
        try:
            with atomic_file(target) as file:
                write_safetensors(file, tensors, {_MANIFEST: json.dumps(manifest)})
        except OSError as error:
            raise StateError(f"cannot write {target}: {error.strerror}") from error
        return target

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], decoder: family.DecoderConfig, device: torch.device | str = "cpu"
    ) -> State:
        """A state that was saved, for a model of the architecture `decoder`.

        Raises:
            StateError: if the file is another model's, or damaged, or none of ours.
        """
        manifest, tensors = _read(Path(path).expanduser())
        if manifest["decoder"] != _fingerprint(decoder):
            raise StateError(f"{path} is the state of another model: a state serves only the architecture that made it")
        lengths = manifest["lengths"]
        state = cls(decoder, len(lengths), manifest["room"])
        for slot, length in enumerate(lengths):
            for i, entry in enumerate(state.layers if length else ()):
                prefix = f"{slot}.{i}."
                names = [name for name in tensors if name.startswith(prefix)]
                found = {name.removeprefix(prefix): tensors.pop(name).to(device) for name in names}
                entry.restore(slot, length, found, f"{path}: slot {slot}, layer {i}")
            state.lengths[slot] = length
        if tensors:
            raise StateError(f"{path}: {next(iter(tensors))} belongs nowhere")
        return state

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < len(self.lengths):
            raise StateError(f"slot {slot} of a state with slots 0 to {len(self.lengths) - 1}")
        return slot


def _entry(mixer: family.Mixer, slots: int, room: int) -> KVCache | Recurrence:
    match mixer:
        case family.Attention(kv_heads=heads, head_dim=head_dim, window=window):
            return KVCache(slots, (heads, head_dim), window, room)
        case family.Recurrent():
            return Recurrence(slots, mixer)


def _refuse_gradients(*tensors: Tensor) -> None:
    if any(tensor.requires_grad for tensor in tensors):
        raise StateError(
            "a State was handed to a forward pass that records gradients: train without a State, "
            "or run under torch.inference_mode()"
        )


# ---------------------------------------------------------------- files

_MANIFEST = "gemkit.state"  # its key in the header
_VERSION = 1


def _fingerprint(decoder: family.DecoderConfig) -> str:
    """Equal for equal architectures; it says nothing of the weights."""
    return hashlib.sha256(repr(decoder).encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_MANIFEST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{path} cannot be read as a state: {error}") from None
    if text is None:
        raise StateError(f"{path} is a safetensors file, but no state: State.save writes them")
    try:
        manifest = json.loads(text)
        version, lengths, room = manifest["version"], manifest["lengths"], manifest["room"]
        sound = type(room) is int and room >= 0 and isinstance(manifest["decoder"], str) and len(lengths) > 0
        sound = sound and all(type(length) is int and length >= 0 for length in lengths)
    except (ValueError, TypeError, KeyError):
        raise StateError(f"{path}: its manifest is damaged") from None
    if version != _VERSION:
        raise StateError(f"{path} is of version {version!r} of the format; this version of gemkit reads {_VERSION}")
    if not sound:
        raise StateError(f"{path}: its manifest is damaged")
    return manifest, tensors


def _take(tensors: Tensors, names: tuple[str, str], where: str) -> tuple[Tensor, Tensor]:
    if set(tensors) != set(names):
        raise StateError(f"{where}: holds {sorted(tensors)}, must hold {sorted(names)}")
    first, second = names
    return tensors[first], tensors[second]


def _expect(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, where: str) -> None:
    expected = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    if tuple(tensor.shape) != shape or tensor.dtype != expected:
        raise StateError(f"{where} is {tuple(tensor.shape)} {tensor.dtype}, must be {shape} {expected}")
