"""Damaged files by the thousand: a reader reads what is consistent or raises WeightsError, soon and in small memory."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemkit.errors import WeightsError
from gemkit.files import DTYPES
from gemkit.weights.formats.gguf import TYPES, GGUFReader, Strings
from gemkit.weights.formats.safetensors import SafetensorsReader

QUICK = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def safetensors_files(draw):
    header, data = {}, b""
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = int(np.prod(shape)) * DTYPES[dtype][0]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += draw(st.binary(min_size=size, max_size=size))
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(NAMES, NAMES, max_size=2))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


@st.composite
def gguf_values(draw):
    """Type and bytes of a metadata value."""
    kind = draw(st.sampled_from(["scalar", "string", "numbers", "strings"]))
    number = draw(st.sampled_from(sorted(SCALARS)))
    zeros = np.zeros(draw(st.integers(0, 4)), np.dtype(SCALARS[number]))
    if kind == "scalar":
        return struct.pack("<I", number) + b"\1" + bytes(zeros.itemsize - 1)
    if kind == "string":
        return struct.pack("<I", 8) + text(draw(NAMES))
    if kind == "numbers":
        return struct.pack("<IIQ", 9, number, len(zeros)) + zeros.tobytes()
    strings = draw(st.lists(NAMES, max_size=4))
    return struct.pack("<IIQ", 9, 8, len(strings)) + b"".join(map(text, strings))


@st.composite
def gguf_files(draw):
    keys = draw(st.dictionaries(NAMES, gguf_values(), max_size=4))
    infos, data = b"", b""
    names = draw(st.lists(NAMES, unique=True, max_size=3))
    for name in names:
        number = draw(st.sampled_from(sorted(TYPES)))
        _, elements, nbytes = TYPES[number]
        axes = [elements * draw(st.integers(1, 2)), *draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))]
        infos += text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, number, len(data))
        size = int(np.prod(axes)) // elements * nbytes
        data += draw(st.integers(0, 255)).to_bytes(1, "little") * size
        data += b"\0" * (-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(names), len(keys))
    head += b"".join(text(key) + value for key, value in keys.items()) + infos
    return head + b"\0" * (-len(head) % 32) + data


@st.composite
def damaged(draw, files):
    """A valid file, then up to three wounds."""
    data = bytearray(draw(files))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        wound = draw(st.sampled_from(["cut", "flip", "insert", "remove", "number", "small number", "swap"]))
        if wound == "cut":
            del data[at:]
        elif wound == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif wound == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif wound == "remove":
            del data[at : at + draw(st.integers(1, 9))]
        elif wound == "number":
            value = 2 ** draw(st.integers(0, 64)) + draw(st.integers(-1, 1))
            data[at : at + 8] = (value % 2**64).to_bytes(8, "little")
        elif wound == "small number":
            data[at : at + 4] = draw(st.integers(0, 45)).to_bytes(4, "little")
        elif wound == "swap":
            other = draw(st.integers(0, len(data)))
            data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]
    return bytes(data)


def survives(reader_class, path, data):
    """Open and read all there is; True if the reader took the file."""
    path.write_bytes(data)
    try:
        with reader_class(path) as reader:
            for value in reader.metadata.values():
                if isinstance(value, Strings):
                    assert len(list(value)) == len(value)
            for name, entry in reader.entries.items():
                assert entry.offset + entry.nbytes <= len(data)
                assert tuple(reader.read(name).shape) == entry.shape
    except WeightsError:
        return False
    return True


READERS = pytest.mark.parametrize(
    ("reader_class", "files"),
    [(SafetensorsReader, safetensors_files()), (GGUFReader, gguf_files())],
    ids=["safetensors", "gguf"],
)


@READERS
def test_whole_files_are_read(tmp_path, reader_class, files):
    @settings(QUICK, max_examples=100)
    @given(files)
    def check(data):
        path = tmp_path / "x"
        path.write_bytes(data)
        with reader_class(path) as reader:
            for name, entry in reader.entries.items():
                if entry.dtype in DTYPES:  # its bytes are those of the file: the strategies know nothing of the reader
                    found = reader.read(name).reshape(-1).view(torch.uint8).numpy().tobytes()
                    assert found == data[entry.offset : entry.offset + entry.nbytes]

    check()


@READERS
def test_damaged_files_are_read_or_refused(tmp_path, reader_class, files):
    outcomes = set()

    @QUICK
    @given(damaged(files))
    def check(data):
        outcomes.add(survives(reader_class, tmp_path / "x", data))  # a loop over a count of the file would take days

    check()
    assert outcomes == {True, False}


def small_file(reader_class):
    if reader_class is SafetensorsReader:
        header = {"x": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "__metadata__": {"a": "b"}}
        encoded = json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + b"\0" * 8
    keys = (
        text("a") + struct.pack("<IIQ", 9, 8, 2) + text("b") + text("c") + text("d") + struct.pack("<IIQH", 9, 2, 1, 7)
    )
    infos = text("x") + struct.pack("<IQQIQ", 2, 32, 2, 2, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + keys + infos
    return head + b"\0" * (-len(head) % 32) + b"\0" * 36


@pytest.mark.parametrize("reader_class", [SafetensorsReader, GGUFReader])
def test_every_length_at_every_place(tmp_path, reader_class):
    """2**k and its neighbours written over every position: whatever field stands there, it is checked before use."""
    whole = small_file(reader_class)
    assert survives(reader_class, tmp_path / "x", whole)
    values = [(2**k + d) % 2**64 for k in (16, 32, 63, 64) for d in (-1, 0, 1)]
    tracemalloc.start()
    for at in range(len(whole) - 8):
        for value in values:
            survives(reader_class, tmp_path / "x", whole[:at] + value.to_bytes(8, "little") + whole[at + 8 :])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20
