"""A GGUF that is written: bytes at their places, read by the gguf package and by our reader."""

import io

import gguf
import numpy as np
import pytest

from gemkit.errors import WeightsError
from gemkit.weights.formats.gguf import GGUFReader
from gemkit.weights.formats.gguf_writer import ALIGNMENT, TensorSpec, write_gguf

METADATA = {
    "general.architecture": "gemma",
    "flag": True,
    "small": 7,
    "negative": -7,
    "large": 2**40,
    "number": 0.5,
    "text": "träge",
    "strings": ["a", "", "▁the"],
    "scores": np.array([0.25, -1.0], np.float32),
    "types": np.array([1, 2, 3], np.int32),
}
SPECS = [TensorSpec("norm", "F32", (3,)), TensorSpec("matrix", "BF16", (2, 5)), TensorSpec("blocks", "Q8_0", (3, 64))]


@pytest.fixture
def written(tmp_path):
    generator = np.random.default_rng(0)
    contents = [generator.integers(0, 256, spec.nbytes, np.uint8) for spec in SPECS]
    with open(tmp_path / "x.gguf", "wb") as file:
        write_gguf(file, METADATA, SPECS, contents)
    return tmp_path / "x.gguf", contents


def test_our_reader_finds_what_was_written(written):
    path, contents = written
    data = path.read_bytes()
    with GGUFReader(path) as reader:
        assert reader.metadata.keys() == METADATA.keys()
        for key, value in METADATA.items():
            found = reader.metadata[key]
            assert list(found) == list(value) if hasattr(value, "__len__") else found == value, key
        for spec, content in zip(SPECS, contents, strict=True):
            info = reader.entries[spec.name]
            assert (info.dtype, info.shape, info.nbytes, info.offset % ALIGNMENT) == (*spec[1:], spec.nbytes, 0)
            assert data[info.offset : info.offset + info.nbytes] == content.tobytes()


def test_the_gguf_package_finds_what_was_written(written):
    path, contents = written
    reader = gguf.GGUFReader(path)
    for spec, content, tensor in zip(SPECS, contents, reader.tensors, strict=True):
        assert (tensor.name, tensor.tensor_type.name, tensor.shape.tolist()) == (*spec[:2], list(spec.shape[::-1]))
        assert tensor.data.tobytes() == content.tobytes()
    assert reader.fields["text"].contents() == "träge"
    assert reader.fields["strings"].contents() == ["a", "", "▁the"]


@pytest.mark.parametrize("value", [None, 2**64, -(2**40), 1j, {"a": 1}, [1, 2], np.zeros((2, 2)), np.zeros(2, complex)])
def test_a_value_that_the_format_cannot_hold(value):
    with pytest.raises(WeightsError, match=r"(?s)metadata key=.* is nothing that GGUF can hold"):
        write_gguf(io.BytesIO(), {"key": value}, [], [])


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [("C64", (2,), "GGUF has no type C64"), ("Q4_K", (2, 250), "rows of 250 are no multiple of 256")],
)
def test_a_tensor_that_the_format_cannot_hold(dtype, shape, message):
    with pytest.raises(WeightsError, match=message):
        write_gguf(io.BytesIO(), {}, [TensorSpec("x", dtype, shape)], [np.zeros(0, np.uint8)])
