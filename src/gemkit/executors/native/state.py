"""The KV cache of the native executor: slots and snapshots of `csrc/state.h`, and snapshots in files. No torch.

A snapshot's file is safetensors: of each layer that attends `layers.{i}.pages`, (pages, bytes of one) from the page
`first` on, and of each that recurs its only page; the manifest in the header says of which decoder it is, how long the
sequence is and what the checksum of the pages is.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemkit.errors import ModelError, StateError
from gemkit.files import atomic_file, write_safetensors

if TYPE_CHECKING:
    from gemkit.executors.native.executor import NativeExecutor

FORMAT = "gemkit snapshot 1"
_MAX_HEADER = 1 << 26


class _Memory:
    """A `State` of csrc: deleted after all of its snapshots, also where the collector finds both in one cycle."""

    def __init__(self, executor: NativeExecutor):
        self.library = executor.library
        self.handle = self.library.gk_state_new(executor.handle)

    def drop(self, snapshot: int) -> None:
        self.library.gk_snapshot_delete(self.handle, snapshot)

    def __del__(self):
        self.library.gk_state_delete(self.handle)


class NativeSnapshot:
    """The memory of one sequence at one moment. Immutable; it shares pages with slots and other snapshots."""

    def __init__(self, state: NativeState, handle: int, length: int):
        self.state = state
        self.handle = handle
        self.length = length
        # no `__del__`: of a cycle's objects those are called in any order, the state's memory perhaps first
        weakref.finalize(self, state.memory.drop, handle).atexit = False

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file with a manifest, atomically; `NativeState.load` reads it, in another process too.

        Raises:
            StateError: if it cannot be written.
        """
        tensors, firsts = {}, []
        for i in range(len(self.state.decoder.layers)):
            first, pages = self.state.pages(self, i)
            firsts.append(first)
            tensors[f"layers.{i}.pages"] = pages
        manifest = {
            "format": FORMAT,
            "decoder": fingerprint(self.state.decoder),
            "length": self.length,
            "first": firsts,
            "checksum": _checksum(tensors),
        }
        try:
            with atomic_file(path) as file:
                write_safetensors(file, tensors, {"manifest": json.dumps(manifest)})
        except OSError as error:
            raise StateError(f"{path} cannot be written: {error.strerror or error}") from error
        return Path(path)


class NativeState:
    """The memory of sequences between calls: one slot a sequence, in pages that slots and snapshots share."""

    def __init__(self, executor: NativeExecutor, slots: int = 0):
        self.executor = executor  # it must outlive the state
        self.decoder = executor.decoder
        self.library = executor.library
        self.memory = _Memory(executor)
        self.handle = self.memory.handle
        self.lengths: dict[int, int] = {}
        # snapshots of each slot whose tokens the slot still begins with
        self._of_slot: dict[int, weakref.WeakSet[NativeSnapshot]] = {}
        for _ in range(slots):
            self.add()

    def add(self) -> int:
        """A new, empty slot. The number of one that was freed may come back."""
        with self.executor.turn:
            return self._add()

    def _add(self) -> int:
        slot = self.library.gk_state_add(self.handle)
        if slot < 0:
            raise ModelError("memory ran out for another slot: free some, or use fewer sequences at once")
        self.lengths[slot] = 0
        self._of_slot[slot] = weakref.WeakSet()
        return slot

    def free(self, slot: int) -> None:
        """End a slot; what no snapshot and no other slot shares with it is given back."""
        with self.executor.turn:
            self._free(slot)

    def _free(self, slot: int) -> None:
        self.library.gk_state_free(self.handle, self.checked(slot))
        del self.lengths[slot], self._of_slot[slot]

    @property
    def nbytes(self) -> int:
        """Bytes held by slots and snapshots, a shared page counted once."""
        return self.library.gk_state_bytes(self.handle)

    def unique(self, held: int | NativeSnapshot, /) -> int:
        """Bytes that freeing this slot, or dropping this snapshot, would give back."""
        with self.executor.turn:
            if isinstance(held, NativeSnapshot):
                return self.library.gk_snapshot_unique(self.handle, held.handle)
            return self.library.gk_state_unique(self.handle, self.checked(held))

    def needed(self, slot: int, tokens: int) -> int:
        """Bytes that a chunk of this many tokens would newly take, copies of shared pages included."""
        with self.executor.turn:
            return self.library.gk_state_needed(self.handle, self.checked(slot), tokens)

    def snapshot(self, slot: int) -> NativeSnapshot:
        """The memory of a slot as it is now."""
        with self.executor.turn:
            handle = self.library.gk_snapshot_new(self.handle, self.checked(slot))
            made = NativeSnapshot(self, handle, self.lengths[slot])
            self._of_slot[slot].add(made)
            return made

    def restore(self, snapshot: NativeSnapshot, slot: int | None = None, *, keep: int = 0) -> int:
        """Put what a snapshot holds into a new slot (None), or in place of what `slot` holds.

        Args:
            keep: of the tokens that `slot` computed since the snapshot was taken of it, the first `keep` stay where
                every layer can keep them. `lengths` say how many were kept.

        Returns:
            the slot.

        Raises:
            StateError: if the snapshot is of another model, or `slot` has not computed `keep` tokens since the snapshot
                was taken of it. Nothing has changed then.
            ModelError: if memory runs out; nothing has changed then either.
        """
        if snapshot.state.decoder != self.decoder:
            raise StateError("the snapshot is of another model, whose layers this one does not have")
        with self.executor.turn:
            new = slot is None
            if keep and (new or snapshot not in self._of_slot[self.checked(slot)]):
                raise StateError(f"keep={keep}, but slot {slot} does not go on from what the snapshot holds")
            if slot is not None and snapshot.length + keep > self.lengths[self.checked(slot)] and keep:
                computed = self.lengths[slot] - snapshot.length
                raise StateError(f"keep={keep}, but slot {slot} computed {computed} tokens since the snapshot")
            slot = self._add() if slot is None else slot
            alien = snapshot.state is not self
            length = self.library.gk_state_restore(self.handle, self.checked(slot), snapshot.handle, alien, keep)
            if length < 0:
                if new:
                    self._free(slot)
                raise ModelError(f"memory ran out for a snapshot of {snapshot.length} tokens: free other slots")
            same = {one for one in self._of_slot[slot] if one.length <= length}
            self._of_slot[slot] = weakref.WeakSet(same if snapshot in same else () if alien else (snapshot,))
            self.lengths[slot] = length
            return slot

    def load(self, path: str | os.PathLike[str]) -> NativeSnapshot:
        """A snapshot that was saved, in this process or another.

        Raises:
            StateError: if the file is damaged, or of another architecture or executor.
        """
        manifest, tensors = _read(Path(path))
        if manifest.get("decoder") != fingerprint(self.decoder):
            raise StateError(f"{path} is a snapshot of another architecture than this model's")
        if _checksum(tensors) != manifest.get("checksum"):
            raise StateError(f"{path} is damaged: its checksum is not that of its pages")
        length, firsts = manifest.get("length"), manifest.get("first")
        layers = len(self.decoder.layers)
        if (
            type(length) is not int
            or not 0 <= length < 1 << 40
            or not isinstance(firsts, list)
            or len(firsts) != layers
        ):
            raise StateError(f"{path} is damaged: its manifest says length={length!r}, first={firsts!r}")
        with self.executor.turn:
            made = NativeSnapshot(self, self.library.gk_snapshot_make(self.handle, length), length)
            for i, first in enumerate(firsts):
                pages, size = tensors.get(f"layers.{i}.pages"), self._page_bytes(made, i)
                fits = type(first) is int and 0 <= first <= length
                if (
                    not fits
                    or pages is None
                    or pages.shape[1] != size
                    or not self.library.gk_snapshot_put(
                        self.handle, made.handle, i, first, len(pages), pages.ctypes.data
                    )
                ):
                    raise StateError(f"{path} is damaged: layer {i} has not the pages of {length} tokens")
        return made

    def pages(self, snapshot: NativeSnapshot, layer: int) -> tuple[int, np.ndarray]:
        """Of a snapshot, the number of the first page of a layer, and the pages from there on, (pages, bytes) uint8."""
        place = np.zeros(2, np.int64)
        size = self.library.gk_snapshot_pages(self.handle, snapshot.handle, layer, place.ctypes.data)
        pages = np.empty((int(place[1]), size), np.uint8)
        self.library.gk_snapshot_get(self.handle, snapshot.handle, layer, pages.ctypes.data)
        return int(place[0]), pages

    def _page_bytes(self, snapshot: NativeSnapshot, layer: int) -> int:
        place = np.zeros(2, np.int64)
        return self.library.gk_snapshot_pages(self.handle, snapshot.handle, layer, place.ctypes.data)

    def checked(self, slot: int | None) -> int:
        """Raises: StateError, if there is no such slot."""
        if slot is None or slot not in self.lengths:
            raise StateError(f"slot {slot} of a state with the slots {sorted(self.lengths)}")
        return slot


def fingerprint(decoder: Any) -> str:
    """What a snapshot says of the model that it is of: its layers and widths, not its weights."""
    return hashlib.sha256(f"native {decoder!r}".encode()).hexdigest()


def _checksum(tensors: Mapping[str, np.ndarray]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(np.ascontiguousarray(tensors[name]).reshape(-1).data, total)
    return total


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest and the arrays of a snapshot's file, each (pages, bytes) uint8 within it."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        size = int.from_bytes(data[:8].tobytes(), "little")
        if not 2 <= size <= min(_MAX_HEADER, len(data) - 8):
            raise ValueError(f"a header of {size} bytes")
        header = json.loads(data[8 : 8 + size].tobytes())
        manifest = json.loads(header.pop("__metadata__")["manifest"])
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
        body, tensors = data[8 + size :], {}
        for name, entry in header.items():
            (pages, width), (start, end) = entry["shape"], entry["data_offsets"]
            numbers = (pages, width, start, end)
            if entry["dtype"] != "U8" or any(type(n) is not int for n in numbers) or min(numbers) < 0:
                raise ValueError(f"{name} is described by {entry}")
            if end > len(body) or end - start != pages * width:
                raise ValueError(f"{name} is cut short")
            tensors[name] = body[start:end].reshape(pages, width)
        return manifest, tensors
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(f"{path} is no snapshot of the native executor, or damaged: {error}") from None
