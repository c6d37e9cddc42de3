"""Our safetensors reader against the library, and against files that are not what they say."""

import json
import os
import struct

import pytest
import safetensors.torch
import torch

from gemkit.errors import WeightsError
from gemkit.files import DTYPES
from gemkit.weights.formats.base import TensorInfo
from gemkit.weights.formats.safetensors import SafetensorsReader

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "scalar": torch.tensor(7.0, dtype=torch.float16),
    "empty": torch.empty(0, 5),
    "ids": torch.tensor([1, -2, 3]),
    "phases": torch.tensor([1 + 2j], dtype=torch.complex64),
}
ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path, header, data=b"\0" * 8, length=None):
    """A file from its parts; `header` may be bytes that are no header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_reads_what_the_library_wrote(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(TENSORS, path, metadata={"format": "pt"})
    with SafetensorsReader(path) as reader:
        assert reader.metadata == {"format": "pt"}
        assert reader.entries.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            found = reader.read(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape == reader.entries[name].shape
            assert torch.equal(found, tensor)


def test_reads_every_dtype_that_it_lists(tmp_path):
    tensors = {
        ours: torch.arange(4).to(getattr(torch, theirs)) for ours, (_, theirs) in DTYPES.items()
    }  # the library names dtypes in the header by its own table
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    with SafetensorsReader(tmp_path / "x.safetensors") as reader:
        for name, tensor in tensors.items():
            assert reader.entries[name].dtype == name
            assert torch.equal(reader.read(name).view(torch.uint8), tensor.view(torch.uint8))


def test_an_entry_says_where_the_bytes_are(tmp_path):
    path = write(tmp_path / "x.safetensors", {"x": ONE}, data=b"abcdefgh")
    with SafetensorsReader(path) as reader:
        entry = reader.entries["x"]
    assert entry == TensorInfo("x", "F32", (2,), path, path.stat().st_size - 8, 8)
    assert path.read_bytes()[entry.offset :] == b"abcdefgh"


def test_reading_an_absent_tensor_names_the_nearest(tmp_path):
    path = write(tmp_path / "x.safetensors", {"model.norm.weight": ONE})
    with SafetensorsReader(path) as reader, pytest.raises(WeightsError, match=r"did you mean model.norm.weight"):
        reader.read("norm.weight")


def with_info(**changes):
    return {"x": ONE | changes}


TWO = {"x": ONE, "y": ONE | {"data_offsets": [8, 16]}}
HOSTILE = {
    "header longer than the file": ({"header": b"{}", "length": 2**62}, "claims a header of 4,611,686,018,427,387,904"),
    "header past the end": ({"header": b"{}", "data": b"", "length": 64}, "the file is 10 bytes, its header needs 72"),
    "seven bytes": (None, "7 bytes: too short"),
    "not UTF-8": ({"header": b'{"\xff": 1}'}, "not JSON: 'utf-8'"),
    "not JSON": ({"header": b"{nope}"}, "is not JSON"),
    "an array": ({"header": b"[1]"}, "does not start with '{'"),
    "nested": ({"header": b'{"x":' + b"[" * 20_000}, "nested too deep"),
    "a number of 10,000 digits": ({"header": b'{"x":' + b"1" * 10_000 + b"}"}, "is not JSON"),
    "duplicate tensor": ({"header": b'{"x":%b,"x":%b}' % ((json.dumps(ONE).encode(),) * 2)}, "repeats the key 'x'"),
    "duplicate dtype": ({"header": b'{"x":{"dtype":"F32","dtype":"F16"}}'}, "repeats the key 'dtype'"),
    "unknown dtype": ({"header": with_info(dtype="F128")}, "unknown dtype 'F128'; known: F64"),
    "dtype is a list": ({"header": with_info(dtype=["F32"])}, r"unknown dtype \['F32'\]"),
    "negative size": ({"header": with_info(shape=[-2])}, r"shape \[-2\]"),
    "true as a size": ({"header": with_info(shape=[True, 2])}, r"shape \[True, 2\]"),
    "fractional size": ({"header": with_info(shape=[2.0])}, r"shape \[2.0\]"),
    "shape is a number": ({"header": with_info(shape=2)}, "not a list"),
    "shape overflows": ({"header": with_info(shape=[2**32, 2**32, 2])}, "more elements than memory"),
    "empty, strides overflow": ({"header": with_info(shape=[0, 2**62, 8], data_offsets=[0, 0])}, "more elements"),
    "nine axes": ({"header": with_info(shape=[2] + [1] * 8)}, "9 axes"),
    "wrong size": ({"header": with_info(shape=[3])}, "12 bytes by dtype and shape, 8 by data_offsets"),
    "negative offset": ({"header": with_info(data_offsets=[-8, 0])}, "two whole numbers from 0"),
    "one offset": ({"header": with_info(data_offsets=[8])}, "two whole numbers from 0"),
    "offsets beyond the file": ({"header": with_info(), "data": b"\0" * 7}, "file is 76 bytes, tensor 'x' needs 77"),
    "gap": ({"header": with_info(data_offsets=[8, 16]), "data": b"\0" * 16}, "leaves a gap before it"),
    "overlap": ({"header": {"x": ONE, "y": ONE | {"data_offsets": [4, 12]}}, "data": b"\0" * 12}, "overlaps"),
    "trailing bytes": ({"header": with_info(), "data": b"\0" * 9}, "1 bytes after the last tensor belong to none"),
    "info is a list": ({"header": {"x": [1]}}, "not described by dtype, shape and data_offsets"),
    "an unknown field": ({"header": with_info(strides=[1])}, "not described by dtype, shape and data_offsets"),
    "metadata of numbers": ({"header": {"__metadata__": {"a": 1}}, "data": b""}, "must map strings to strings"),
}


@pytest.mark.parametrize(("parts", "message"), HOSTILE.values(), ids=HOSTILE)
def test_refuses(tmp_path, parts, message):
    path = tmp_path / "x.safetensors"
    if parts is None:
        path.write_bytes(b"\2\0\0\0\0\0\0")
    else:
        write(path, **parts)
    with pytest.raises(WeightsError, match=message):
        SafetensorsReader(path)


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            SafetensorsReader(path)


def test_a_file_that_changes_under_an_open_reader_is_an_error(tmp_path):
    path = write(tmp_path / "x.safetensors", {"x": ONE})
    with SafetensorsReader(path) as reader:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(WeightsError, match="changed while it was being read"):
            reader.read("x")


def test_a_file_replaced_by_another_is_read_as_it_was(tmp_path):
    path = write(tmp_path / "x.safetensors", {"x": ONE}, data=struct.pack("<2f", 1, 2))
    new = write(tmp_path / "new", {"x": ONE}, data=struct.pack("<2f", 3, 4))
    with SafetensorsReader(path) as reader:
        os.replace(new, path)
        assert reader.read("x").tolist() == [1, 2]


# Folders and their index.


def shards(folder, weight_map=None, **files):
    """Shards x, y of one tensor each, and the index that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in (("m-1.safetensors", "x"), ("m-2.safetensors", "y")):
        write(folder / name, {tensor: ONE}, data=struct.pack("<2f", ord(tensor), 0))
    weight_map = weight_map or {"x": "m-1.safetensors", "y": "m-2.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map}))
    return index


def test_reads_shards_by_folder_and_by_index(tmp_path):
    index = shards(tmp_path)
    for path in (tmp_path, index):
        with SafetensorsReader(path) as reader:
            assert list(reader.entries) == ["x", "y"]
            assert [reader.read(name)[0].item() for name in "xy"] == [ord("x"), ord("y")]


def test_a_missing_shard_is_an_incomplete_download(tmp_path):
    weight_map = {"x": "m-1.safetensors", "y": "m-2.safetensors", "z": "m-3.safetensors"}
    shards(tmp_path, weight_map)
    with pytest.raises(WeightsError, match=r"incomplete download: 2 of 3 shards; missing: m-3.safetensors"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../m-1.safetensors",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        ".hidden",
        "C:x",
        r"..\x",
        r"\\host\x",
        "%2e%2e",
        "a\0b",
        3,
    ],
)
def test_an_index_names_only_files_beside_it(tmp_path, name):
    shards(tmp_path / "inside", {"x": name})
    with pytest.raises(WeightsError, match="not the name of a file beside it"):
        SafetensorsReader(tmp_path / "inside")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    shards(tmp_path / "inside")
    (tmp_path / "inside/m-1.safetensors").rename(tmp_path / "elsewhere")
    (tmp_path / "inside/m-1.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="a link out of its folder"):
        SafetensorsReader(tmp_path / "inside")


def test_the_links_of_the_hugging_face_cache_are_followed(tmp_path):
    repo = tmp_path / "models--google--gemma-2b"
    shards(repo / "snapshots/c0ffee")
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted((repo / "snapshots/c0ffee").iterdir())):
        path.rename(repo / f"blobs/{i}")
        path.symlink_to(f"../../blobs/{i}")
    with SafetensorsReader(repo / "snapshots/c0ffee") as reader:
        assert list(reader.entries) == ["x", "y"]
    (repo / "snapshots/c0ffee/m-1.safetensors").unlink()
    (repo / "snapshots/c0ffee/m-1.safetensors").symlink_to("../../../other--repo/blobs/0")
    (tmp_path / "other--repo/blobs").mkdir(parents=True)
    (repo / "blobs/0").rename(tmp_path / "other--repo/blobs/0")
    with pytest.raises(WeightsError, match="a link out of its folder"):
        SafetensorsReader(repo / "snapshots/c0ffee")


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    shards(tmp_path / "absent", {"x": "m-1.safetensors", "y": "m-2.safetensors", "z": "m-2.safetensors"})
    with pytest.raises(WeightsError, match=r"1 tensors of the index are not in this shard, first 'z'"):
        SafetensorsReader(tmp_path / "absent")
    shards(tmp_path / "extra")
    info = ONE | {"data_offsets": [8, 16]}
    write(tmp_path / "extra/m-2.safetensors", {"y": ONE, "more": info}, data=b"\0" * 16)
    with pytest.raises(WeightsError, match=r"not in the index.*first 'more'"):
        SafetensorsReader(tmp_path / "extra")
    shards(tmp_path / "twice")
    write(tmp_path / "twice/m-2.safetensors", {"y": ONE, "x": info}, data=b"\0" * 16)
    with pytest.raises(WeightsError, match=r"tensor 'x' appears twice"):
        SafetensorsReader(tmp_path / "twice")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["x"]}', "no weight_map"),
        ("[]", "a list where an object should be"),
        ('{"weight_map": {"x": "a", "x": "b"}}', "repeats the key 'x'"),
        ("[" * 100_000, "nested too deep"),
        ("not JSON", "is not JSON"),
    ],
)
def test_refuses_what_is_no_index(tmp_path, text, message):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(WeightsError, match=message):
        SafetensorsReader(path)


def test_folders_that_leave_it_open_what_to_read(tmp_path):
    with pytest.raises(WeightsError, match="holds no safetensors files"):
        SafetensorsReader(tmp_path)
    write(tmp_path / "adapter.safetensors", {"x": ONE})
    with SafetensorsReader(tmp_path) as reader:
        assert list(reader.entries) == ["x"]
    write(tmp_path / "another.safetensors", {"y": ONE})
    with pytest.raises(WeightsError, match=r"2 safetensors files but no model.safetensors.index.json"):
        SafetensorsReader(tmp_path)
    write(tmp_path / "model.safetensors", {"z": ONE})
    with SafetensorsReader(tmp_path) as reader:
        assert list(reader.entries) == ["z"]
    shards(tmp_path)
    with SafetensorsReader(tmp_path) as reader:  # beside an index the single file is read, as in Transformers
        assert list(reader.entries) == ["z"]


def test_what_wrappers_left_in_a_name_is_taken_off(tmp_path):
    names = ["_orig_mod.model.norm.weight", "module.model.a", "base_model.model.model.b.base_layer.weight", "model.c"]
    safetensors.torch.save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader:
        assert reader.unwrap() == 3
        assert set(reader.entries) == {"model.norm.weight", "model.a", "model.b.weight", "model.c"}
    names = ["module.model.a", "model.a"]
    safetensors.torch.save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader, pytest.raises(WeightsError, match=r"are one tensor, 'model\.a'"):
        reader.unwrap()


def test_one_shard_alone_is_not_the_model(tmp_path):
    write(tmp_path / "model-00001-of-00003.safetensors", {"x": ONE})
    with pytest.raises(WeightsError, match=r"no model.safetensors.index.json: fetch the index too"):
        SafetensorsReader(tmp_path)
