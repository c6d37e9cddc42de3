"""The reader of gemma_pytorch checkpoints against torch itself, and against pickles that want more than tensors."""

import collections
import io
import json
import pickle
import struct
import zipfile

import pytest
import torch

from gemkit.errors import WeightsError
from gemkit.weights.formats.torch_checkpoint import CkptReader

TENSORS = {
    "embedder.weight": torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "model.norm.weight": torch.ones(4),
    "freqs_cis": torch.polar(torch.ones(3), torch.arange(3.0)),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gemma.ckpt"


def save(path, tensors, **more):
    torch.save({"model_state_dict": tensors, **more}, path)
    return path


def test_reads_what_torch_saved(path):
    save(path, TENSORS, step=3)
    loaded = torch.load(path, weights_only=True)["model_state_dict"]
    with CkptReader(path) as reader:
        assert reader.metadata == {"step": 3}
        assert reader.entries.keys() == loaded.keys()
        for name, tensor in loaded.items():
            found = reader.read(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor)
            assert found.data_ptr() != reader.read(name).data_ptr()  # fresh memory, no map of the file


def test_reads_parameters_ordered_dicts_and_shared_storages(path):
    whole = torch.arange(12.0).view(4, 3)
    module = torch.nn.Linear(2, 2)
    state = collections.OrderedDict(module.state_dict(keep_vars=True))
    save(path, state | {"whole": whole, "rows": whole[1:3], "again": whole, "empty": torch.empty(0, 3)})
    with CkptReader(path) as reader:
        assert reader.read("rows").tolist() == whole[1:3].tolist()
        assert reader.entries["again"].offset == reader.entries["whole"].offset
        assert torch.equal(reader.read("weight"), module.weight)
        assert reader.read("empty").shape == (0, 3)


def test_reads_a_file_of_an_older_torch(path):
    # before torch 2.7 records were aligned otherwise and carried no .format_version: the offsets come from the archive
    save(path, TENSORS)
    old = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(old, "w") as copy:
        for entry in archive.infolist():
            if not entry.filename.endswith((".format_version", ".storage_alignment")):
                copy.writestr(entry.filename, archive.read(entry))
    path.write_bytes(old.getvalue())
    with CkptReader(path) as reader:
        for name, tensor in TENSORS.items():
            assert torch.equal(reader.read(name), tensor)


def test_reads_shards(tmp_path):
    for i, name in enumerate(TENSORS):
        torch.save({name: TENSORS[name]}, tmp_path / f"pytorch_model-{i}.bin")
    index = {"weight_map": {name: f"pytorch_model-{i}.bin" for i, name in enumerate(TENSORS)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with CkptReader(tmp_path) as reader:
        assert {name: reader.read(name).tolist() for name in reader.entries} == {
            k: v.tolist() for k, v in TENSORS.items()
        }
    (tmp_path / "pytorch_model-1.bin").unlink()
    with pytest.raises(WeightsError, match=r"incomplete download: 2 of 3 shards; missing: pytorch_model-1.bin"):
        CkptReader(tmp_path)


class Gadget:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (exec, (f"open({str(self.target)!r}, 'w').close()",))


@pytest.mark.parametrize("where", ["tensor", "metadata", "top"])
def test_a_gadget_is_refused_and_does_not_run(path, tmp_path, where):
    trace = tmp_path / "it-ran"
    gadget = Gadget(trace)
    torch.save(
        {
            "tensor": {"model_state_dict": {"x": gadget}},
            "metadata": {"model_state_dict": TENSORS, "args": gadget},
            "top": gadget,
        }[where],
        path,
    )
    with pytest.raises(WeightsError, match=r"asks for exec, which is never granted: take a safetensors"):
        CkptReader(path)
    assert not trace.exists()
    with pytest.raises(pickle.UnpicklingError):  # the file is what it should be: it is the gadget that is refused
        torch.load(path, weights_only=True)


def sparse():
    """Two kilobytes of file that would be four terabytes of tensor."""
    return torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (2**40,), check_invariants=False)


def strided_view():
    return torch.arange(6.0).view(2, 3).t()


def beyond_its_storage():
    tensor = torch.zeros(4)
    return tensor.as_strided((1000, 1000), (0, 0))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (sparse(), "'x' is torch.sparse_coo torch.float32; dense tensors"),
        (strided_view(), r"'x' is not contiguous: shape \(3, 2\), strides \(1, 3\)"),
        (beyond_its_storage(), "'x' is not contiguous"),
        (torch.zeros(2, dtype=torch.complex128), r"torch.complex128; dense tensors of these are read: F64, F32"),
        (torch.zeros([1] * 9), "9 axes, more than 8"),
        ("a string", "'x' is a str"),
        (None, "'x' is a NoneType"),
    ],
)
def test_only_dense_contiguous_tensors_are_taken(path, tensor, message):
    save(path, {"x": tensor})
    with pytest.raises(WeightsError, match=message):
        CkptReader(path)


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The archive with some records changed: `change(name, data)` gives the new data."""
    new = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(new, "w", compression) as copy:
        for entry in archive.infolist():
            if not entry.filename.endswith((".format_version", ".storage_alignment")):
                copy.writestr(entry.filename, change(entry.filename, archive.read(entry)))
    path.write_bytes(new.getvalue())


def test_a_storage_smaller_than_its_shape_is_refused(path):
    save(path, {"x": torch.zeros(1000)})
    rewritten(path, lambda name, data: data[:100] if name.endswith("data/0") else data)
    with pytest.raises(WeightsError, match="'x' of 4,000 bytes does not fit the record that it points to"):
        CkptReader(path)


def test_a_shape_larger_than_its_storage_is_refused(path):
    save(path, {"x": torch.zeros(7)})
    # protocol 2 writes small integers as K and one byte: the storage keeps 7 elements, the shape claims 255
    size = b"K\x00K\x07\x85"
    rewritten(path, lambda name, data: data.replace(size, b"K\x00K\xff\x85") if name.endswith(".pkl") else data)
    with zipfile.ZipFile(path) as archive:
        assert b"K\x00K\xff\x85" in archive.read("gemma/data.pkl")
    with pytest.raises(WeightsError, match="of 1,020 bytes does not fit the record"):
        CkptReader(path)


def test_compressed_records_are_refused(path):
    save(path, {"x": torch.zeros(1000)})
    rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="does not fit the record"):
        CkptReader(path)


def legacy(target):
    torch.save({"model_state_dict": TENSORS}, target, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\): an interrupted download"),
        (b"<!DOCTYPE html><html>Access denied</html>", "a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (pickle.dumps({"a": 1}, protocol=2), "a bare pickle, which can run code"),
        (b"PK\x03\x04" + b"\0" * 100, "incomplete download, or corrupt"),
        (b"hello", "no torch file"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_words(path, content, message):
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        CkptReader(path)


def test_files_of_the_time_before_zip_are_refused(path):
    legacy(path)
    with pytest.raises(WeightsError, match="a bare pickle, which can run code"):
        CkptReader(path)


def test_a_zip_of_something_else_is_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match=r"a zip archive, but not one that torch.save wrote"):
        CkptReader(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not tensors by name"),
        ({1: torch.zeros(1)}, "not tensors by name"),
        ({}, "holds no tensors by name"),
        ({"model_state_dict": {}}, "holds no tensors by name"),
        ({"model_state_dict": [1]}, "holds no tensors by name"),
        ({"model": 1}, "tensor 'model' is a int"),
    ],
)
def test_another_structure_is_refused(path, content, message):
    torch.save(content, path)
    with pytest.raises(WeightsError, match=message):
        CkptReader(path)


def test_int8_checkpoints_are_refused_with_the_way_out(path):
    name = "model.layers.0.mlp.gate_proj.weight"
    save(path, {name: torch.zeros(2, 2, dtype=torch.int8), name + "_scaler": torch.ones(2)})
    with pytest.raises(WeightsError, match=r"int8 checkpoint .* take the bf16 checkpoint"):
        CkptReader(path)


def test_pickles_in_hugging_faces_layout_are_read_by_its_names(tmp_path):
    torch.save({"model.embed_tokens.weight": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    for target in (tmp_path, tmp_path / "pytorch_model.bin"):
        with CkptReader(target) as reader:
            assert reader.format == "safetensors"
            assert torch.equal(reader.read("model.embed_tokens.weight"), torch.ones(2, 2))


def test_a_truncated_file_is_refused_at_any_length(path):
    save(path, TENSORS)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            CkptReader(path)


def test_flipped_bytes_in_the_archive_give_a_whole_reader_or_an_error(path):
    save(path, TENSORS)
    whole = bytearray(path.read_bytes())
    read = 0
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + struct.pack("B", whole[at] ^ 0x41) + whole[at + 1 :])
        try:
            with CkptReader(path) as reader:
                for name, entry in reader.entries.items():
                    assert tuple(reader.read(name).shape) == entry.shape
                    read += 1
        except WeightsError:
            pass
    assert read  # most flips hit padding or numbers: no reader can see those
