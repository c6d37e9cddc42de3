"""Checkpoints of Google's PyTorch code: what `torch.save` wrote, read without running what a pickle asks for.

A `.ckpt` holds {"model_state_dict": {name: tensor}}; large members are a folder of shards that hold {name: tensor},
under `pytorch_model.bin.index.json`; a `.pt` of RecurrentGemma holds {name: tensor} too. Such a file is a zip archive:
a pickle that describes the tensors, and a record for each one's numbers. The pickle is read by torch's restricted
loader onto the meta device, which allocates nothing; the numbers are then read from their records like those of any
other format.

Source: https://github.com/google/gemma_pytorch (gemma/model.py, `load_weights`) and
https://github.com/google-deepmind/recurrentgemma (colabs).
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemkit.errors import WeightsError
from gemkit.files import DTYPES
from gemkit.weights.formats.base import MAX_AXES, File, Reader, TensorInfo, only_file
from gemkit.weights.formats.shards import check_shard, read_index

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "pytorch_model.bin.index.json"


class CkptReader(Reader):
    """A gemma_pytorch `.ckpt` file, an index of shards, or a folder with one of these.

    `metadata` is what else the file's dict holds. Opening one imports torch.
    """

    format = "ckpt"

    def _scan(self) -> None:
        target = self.path
        if target.is_dir():
            target = target / INDEX if (target / INDEX).exists() else _only_checkpoint(target)
        if target.name.endswith(".index.json"):
            for path, promised in read_index(target).items():
                before = set(self.entries)
                self._scan_file(self._open(path))
                check_shard(path, promised, set(self.entries) - before)
        else:
            self._scan_file(self._open(target))
        self._tell_layout()

    def _scan_file(self, file: File) -> None:
        records = _stored_records(file)
        content = _unpickle(file)
        tensors = content.pop("model_state_dict", None)
        if tensors is None:  # a shard, or a .pt
            tensors, content = content, {}
        if not isinstance(tensors, dict) or not tensors:
            raise WeightsError(f"{file.path} holds no tensors by name")
        self.metadata |= content
        for name, tensor in tensors.items():
            self._add(_entry(file, name, tensor, records))

    def _tell_layout(self) -> None:
        for name in self.entries:
            if name.endswith("weight_scaler"):
                raise WeightsError(
                    f"{self.path} is an int8 checkpoint ({name}), which is not read: take the bf16 checkpoint of the "
                    "same member and quantize that"
                )
            if name.endswith(("embed_tokens.weight", "q_proj.weight")):
                self.format = "safetensors"  # a pickled `pytorch_model.bin` has Hugging Face's names


def _only_checkpoint(folder: Path) -> Path:
    if (folder / "pytorch_model.bin").exists():
        return folder / "pytorch_model.bin"
    return only_file(folder, "*.pt" if any(folder.glob("*.pt")) else "*.ckpt")


def _stored_records(file: File) -> dict[int, int]:
    """Where the archive's uncompressed records start in the file, and their sizes.

    Raises:
        WeightsError: if it is not a complete zip archive of `torch.save`'s.
    """
    head = file.head()
    if not head.startswith(b"PK"):
        legacy = head[:1] == b"\x80"
        kind = "a bare pickle, which can run code when it is loaded" if legacy else f"no torch file ({head[:8]!r})"
        raise WeightsError(f"{file.path} is {kind}: what torch.save writes since version 1.6 is a zip archive")
    records = {}
    try:
        with open(file.fileno(), "rb", closefd=False) as raw, zipfile.ZipFile(raw) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, UnicodeDecodeError) as error:
        raise WeightsError(f"{file.path}: incomplete download, or corrupt: {error}") from None
    if not any(info.filename.endswith("/data.pkl") for info in infos):
        raise WeightsError(f"{file.path} is a zip archive, but not one that torch.save wrote: it has no data.pkl")
    for info in infos:
        # the data begins after the local header: 30 bytes, then a name and extras whose lengths stand in it
        if info.compress_type == zipfile.ZIP_STORED and 0 <= info.header_offset <= file.size - 30:
            local = file.read(30, info.header_offset)
            name, extra = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
            records[info.header_offset + 30 + name + extra] = info.file_size
    return records


def _unpickle(file: File) -> dict[str, Any]:
    import torch

    try:
        with open(file.fileno(), "rb", closefd=False) as raw:
            raw.seek(0)
            content = torch.load(raw, weights_only=True, map_location="meta")
    except Exception as error:  # a hostile pickle makes the loader fail in any way it can; none of them ran its code
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"its pickle asks for {asked[1]}, which is never granted" if asked else "its pickle is corrupt"
        raise WeightsError(f"{file.path}: {reason}: take a safetensors or GGUF file of the same model") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise WeightsError(f"{file.path} holds a {type(content).__name__}, not tensors by name")
    return content


def _entry(file: File, name: str, tensor: Tensor, records: dict[int, int]) -> TensorInfo:
    """A tensor that lies whole, dense and in order in a record of its own size.

    Anything else (sparse, strided, on a storage that is too small for its shape) says less than it unfolds to.
    """
    import torch

    where = f"{file.path}: tensor {name!r}"
    if not isinstance(tensor, torch.Tensor):
        raise WeightsError(f"{where} is a {type(tensor).__name__}")
    dtypes = {torch_name: ours for ours, (_, torch_name) in DTYPES.items()}
    dtype = dtypes.get(str(tensor.dtype).removeprefix("torch."))
    if len(tensor.shape) > MAX_AXES:
        raise WeightsError(f"{where} has {len(tensor.shape)} axes, more than {MAX_AXES}")
    if tensor.layout is not torch.strided or dtype is None:
        raise WeightsError(
            f"{where} is {tensor.layout} {tensor.dtype}; dense tensors of these are read: {', '.join(DTYPES)}"
        )
    if not tensor.is_contiguous():
        raise WeightsError(f"{where} is not contiguous: shape {tuple(tensor.shape)}, strides {tensor.stride()}")
    storage = tensor.untyped_storage()
    record = storage._checkpoint_offset  # set by loads onto the meta device
    begin, nbytes = int(tensor.storage_offset()) * tensor.element_size(), tensor.numel() * tensor.element_size()
    if record is None or records.get(record) != storage.nbytes() or begin + nbytes > storage.nbytes():
        raise WeightsError(f"{where} of {nbytes:,} bytes does not fit the record that it points to")
    return TensorInfo(name, dtype, tuple(tensor.shape), file.path, record + begin, nbytes)
