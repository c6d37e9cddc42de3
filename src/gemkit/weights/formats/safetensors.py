"""safetensors: eight bytes of length, a JSON header, then the numbers end to end.

Source: https://github.com/huggingface/safetensors (format). Stricter than the library: a repeated key is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gemkit.block_types import KINDS
from gemkit.errors import WeightsError
from gemkit.files import DTYPES
from gemkit.weights.formats.base import MAX_HEADER, File, Reader, TensorInfo, count_elements, parse_json
from gemkit.weights.formats.shards import check_shard, read_index

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

if TYPE_CHECKING:
    from torch import Tensor

    from gemkit.ops.quantized import Quantized

_DTYPES = {"uint8": "U8", "int8": "I8", "float16": "F16"}  # of planes, as the format calls them


class SafetensorsReader(Reader):
    """A `.safetensors` file, an index of several, or a folder with one of these.

    `metadata` is the header's `__metadata__` (strings to strings), of all shards together.
    """

    format = "safetensors"

    def _scan(self) -> None:
        self._planes: dict[str, dict[str, TensorInfo]] = {}
        target = _choose(self.path) if self.path.is_dir() else self.path
        if not target.name.endswith(".index.json"):
            self._scan_file(self._open(target))
            return
        for path, promised in read_index(target).items():
            before = set(self.entries)
            self._scan_file(self._open(path))
            check_shard(path, promised, set(self.entries) - before)

    def _scan_file(self, file: File) -> None:
        header, start = _read_header(file)
        notes = header.pop("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
            raise WeightsError(f"{file.path}: __metadata__ must map strings to strings")
        self.metadata |= notes
        entries = [_entry(file.path, start, name, info) for name, info in header.items()]
        end = start
        for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
            if entry.offset != end:
                word = "overlaps the one before it" if entry.offset < end else "leaves a gap before it"
                raise WeightsError(f"{file.path}: tensor {entry.name!r} {word}: bytes {entry.offset - start:,} on")
            self._add(entry)
            end = entry.offset + entry.nbytes
        if end != file.size:
            raise WeightsError(f"{file.path}: {file.size - end:,} bytes after the last tensor belong to none")

    def join(self, kinds: Mapping[str, str]) -> None:
        """Make one entry of the planes of each quantized weight, which the file holds as `<weight>.<plane>`.

        Args:
            kinds: block type by weight.

        Raises:
            WeightsError: if a type is unknown, or planes are missing or of another shape or dtype than it has.
        """
        for name, kind in kinds.items():
            where = f"{self.path}: {name!r}"
            if name in self.entries:
                raise WeightsError(f"{where} is said to be {kind!r}, but is also stored as it is")
            if not isinstance(kind, str) or kind not in KINDS:
                raise WeightsError(f"{where} is said to be {kind!r}, which is not one of {', '.join(KINDS)}")
            planes = {plane.name: self._take(f"{name}.{plane.name}") for plane in KINDS[kind].planes()}
            shape = _joined_shape(where, kind, planes)
            self._planes[name] = planes
            codes = planes["codes"]
            nbytes = sum(entry.nbytes for entry in planes.values())
            self.entries[name] = TensorInfo(name, kind, shape, codes.path, codes.offset, nbytes)

    def _take(self, name: str) -> TensorInfo:
        entry = self._entry(name)
        del self.entries[name]
        return entry

    def planes(self, name: str) -> dict[str, TensorInfo]:
        return self._planes.get(name) or super().planes(name)

    def read(self, name: str) -> Tensor | Quantized:
        if name not in self._planes:
            return super().read(name)
        from gemkit.ops.quantized import Quantized

        entry = self._entry(name)
        planes = {plane: self._read_dense(part) for plane, part in self._planes[name].items()}
        return Quantized(KINDS[entry.dtype], planes, (entry.shape[0], entry.shape[1]))


def _joined_shape(where: str, kind: str, planes: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """Shape of the weight that planes make up."""
    codes = planes["codes"].shape
    if len(codes) != 2:
        raise WeightsError(f"{where}: its codes have the shape {codes}, not that of a matrix")
    block = KINDS[kind]
    rows, columns = codes[0], codes[1] * 8 // block.bits[0]
    if columns % block.row_multiple:
        raise WeightsError(f"{where} is {kind}, but its rows of {columns:,} are not a multiple of {block.row_multiple}")
    for plane, (shape, dtype) in block.layout(rows, columns).items():
        found, wanted = planes[plane], (shape, _DTYPES[dtype])
        if (found.shape, found.dtype) != wanted:
            raise WeightsError(
                f"{where}: plane {plane} is {found.shape} {found.dtype}, must be {wanted[0]} {wanted[1]} for {kind}"
            )
    return rows, columns


def _choose(folder: Path) -> Path:
    """The file of a folder that says what is in it."""
    index, single = folder / INDEX, folder / SINGLE
    if single.exists():  # also beside an index, as Transformers chooses
        return single
    if index.exists():
        return index
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1 and "-of-" not in files[0].name:
        return files[0]
    if files:
        raise WeightsError(f"{folder} holds {len(files)} safetensors files but no {INDEX}: fetch the index too")
    raise WeightsError(f"{folder} holds no safetensors files")


def _read_header(file: File) -> tuple[dict, int]:
    """The JSON header and the offset of the data after it."""
    if file.size < 8:
        raise WeightsError(f"{file.path} is {file.size} bytes: too short for a safetensors file")
    length = int.from_bytes(file.read(8, 0), "little")
    if length > MAX_HEADER:
        raise WeightsError(f"{file.path} claims a header of {length:,} bytes; not a safetensors file?")
    if 8 + length > file.size:
        raise WeightsError(f"{file.path}: the file is {file.size:,} bytes, its header needs {8 + length:,}")
    text = file.read(length, 8)
    if not text.startswith(b"{"):
        raise WeightsError(f"{file.path}: its header does not start with '{{'; not a safetensors file?")
    return parse_json(text, f"the header of {file.path}"), 8 + length


def _entry(path: Path, start: int, name: str, info: object) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WeightsError(f"{where} has the unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list):
        raise WeightsError(f"{where} has the shape {shape!r}, which is not a list")
    nbytes = count_elements(shape, where) * DTYPES[dtype][0]
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(at) is not int or at < 0 for at in offsets):
        raise WeightsError(f"{where} has the data_offsets {offsets!r}: two whole numbers from 0 are needed")
    begin, end = offsets
    if end - begin != nbytes:
        raise WeightsError(f"{where} is {nbytes:,} bytes by dtype and shape, {end - begin:,} by data_offsets")
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, nbytes)
