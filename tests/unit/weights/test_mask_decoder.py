"""`vae-oid.npz`: what is refused, and NumPy archives in general."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemkit.errors import WeightsError
from gemkit.weights.formats.npz import NpzReader
from gemkit.weights.mask_decoder import load_mask_decoder
from support import mask_weights


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vae-oid.npz"


def record(array, **options):
    data = io.BytesIO()
    np.lib.format.write_array(data, array, **options)
    return data.getvalue()


def archive(path, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in records:
            file.writestr(name, data)


# ---------------------------------------------------------------- archives


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_wrote_them(path, save):
    arrays = {
        f"{dtype}/{shape}": np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
        for dtype in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1")
        for shape in ((), (0,), (5,), (2, 3), (2, 1, 3, 2))
    }
    arrays["columns first"] = np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))
    save(path, **arrays)
    with NpzReader(path) as reader:
        assert {name: entry.shape for name, entry in reader.entries.items()} == {n: a.shape for n, a in arrays.items()}
        for name, array in arrays.items():
            got = reader.read(name)
            assert got.is_contiguous()
            np.testing.assert_array_equal(got.numpy(), array, strict=True)
        with pytest.raises(WeightsError, match="no tensor 'f8'"):
            reader.read("f8")


def test_bfloat16_of_jax_is_read(path):
    numbers = torch.tensor([1.0, -2.5, 3e38], dtype=torch.bfloat16)
    np.savez(path, x=numbers.view(torch.int16).numpy().view("V2"))
    with NpzReader(path) as reader:
        assert torch.equal(reader.read("x"), numbers)


def test_a_pickle_is_never_opened(path):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("its code ran",)

    np.savez(path, **{"decoder.0.weight": np.array([Bomb()], dtype=object)})
    with pytest.raises(WeightsError, match="holds Python objects, a pickle, which can run code"):
        NpzReader(path)
    archive(path, [("x.npy", pickle.dumps(Bomb()))])
    with pytest.raises(WeightsError, match=r"is no \.npy record"):
        NpzReader(path)


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


def forged(header, data=bytes(8), version=1):
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2 if version == 1 else 4, "little") + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (forged(HEADER.replace(b"(2,)", b"(4611686018427387904,)")), "more elements than memory can hold"),
        (forged(HEADER.replace(b"(2,)", b"(1099511627776,)")), "needs 4,398,046,511,"),
        (forged(HEADER.replace(b"(2,)", b"(3,)")), "needs 79 bytes, not 75"),
        (forged(HEADER.replace(b"(2,)", b"(-2,)")), "is no plain array"),
        (forged(HEADER.replace(b"(2,)", b"(2, 1, 1, 1, 1, 1, 1, 1, 1)")), "has 9 axes"),
        (forged(HEADER.replace(b"<f4", b">f4")), "has the dtype '>f4'; these are read: <f8, <f4"),
        (forged(HEADER.replace(b"'<f4'", b"[('a', '<f4')]")), "is no plain array"),
        (forged(b"__import__('os').abort()"), "is no plain array"),
        (forged(b"(" * 9000), "is no plain array"),
        (forged(HEADER + b" " * 20_000), "a header of 20,057 bytes"),
        (forged(HEADER, version=2)[:10] + b"\xff\xff", "a header of 4,294,"),
        (forged(HEADER, version=9), r"is no \.npy record"),
        (forged(HEADER)[:40], "is no plain array"),
        (b"", r"is no \.npy record"),
        (b"\x93NUMPY", r"is no \.npy record"),
    ],
)
def test_forged_records_are_refused(path, content, message):
    archive(path, [("x.npy", content)])
    with pytest.raises(WeightsError, match=message):
        NpzReader(path)


def test_a_small_file_that_unfolds_to_a_large_one_is_refused(path):
    """Its directory promises more than deflate can hold."""
    archive(path, [("x.npy", record(np.zeros(1 << 16, np.float32)))], zipfile.ZIP_DEFLATED)
    size = 128 + (1 << 18)
    whole = path.read_bytes()
    assert whole.count(size.to_bytes(4, "little")) == 2  # local header, directory
    path.write_bytes(whole.replace(size.to_bytes(4, "little"), (1 << 31).to_bytes(4, "little")))
    with pytest.raises(WeightsError, match="promises 2,147,483,648 bytes from a file of"):
        NpzReader(path)


def test_other_archives_are_refused(path):
    for records, message in (
        ([("readme.txt", b"hello")], "holds no arrays"),
        ([], "is a zip archive, but holds no arrays"),
    ):
        archive(path, records)
        with pytest.raises(WeightsError, match=message):
            NpzReader(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(path, [("x.npy", record(np.zeros(2)))] * 2)
    with pytest.raises(WeightsError, match="'x' appears twice"):
        NpzReader(path)
    archive(path, [("x.npy", record(np.zeros(2)))], zipfile.ZIP_LZMA)
    with pytest.raises(WeightsError, match="compressed in a way that NumPy does not use"):
        NpzReader(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<html>", "a web page"),
        (record(np.zeros(3)), "is no NumPy archive"),
        (b"PK\x03\x04 and no more", "incomplete download, or corrupt"),
    ],
)
def test_what_is_no_archive_is_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load_mask_decoder(path)


def test_no_file(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        load_mask_decoder(tmp_path / "vae-oid.npz")
    with pytest.raises(WeightsError, match="not a regular file"):
        load_mask_decoder(tmp_path)


@settings(max_examples=400)
@given(
    compression=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    wounds=st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "number"]), st.integers(0, 255))),
)
def test_damaged_archives_are_read_or_refused(tmp_path_factory, compression, wounds):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    archive(path, [("x.npy", record(np.arange(6.0))), ("y.npy", record(np.zeros((2, 2), "f4")))], compression)
    data = bytearray(path.read_bytes())
    for where, kind, value in wounds:
        at = int(where * len(data))
        if kind == "cut":
            del data[at:]
        elif kind == "flip":
            data[at : at + 1] = bytes([value])
        else:
            data[at : at + 4] = (2**32 - 1 - value).to_bytes(4, "little")
    path.write_bytes(data)
    try:
        with NpzReader(path) as reader:
            for name, entry in reader.entries.items():
                assert tuple(reader.read(name).shape) == entry.shape
    except WeightsError:
        pass


def test_a_flipped_number_is_noticed(path):
    archive(path, [("x.npy", record(np.arange(5000.0)))])  # longer than what is read with its header
    whole = bytearray(path.read_bytes())
    whole[whole.index(np.float64(4999).tobytes())] ^= 1
    path.write_bytes(whole)
    with NpzReader(path) as reader, pytest.raises(WeightsError, match="array 'x' is damaged: Bad CRC-32"):
        reader.read("x")


def test_a_file_that_is_cut_off_is_refused_at_any_length(path):
    np.savez(path, x=np.arange(4.0))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            NpzReader(path)


# ---------------------------------------------------------------- the mask decoder's


def changed(path, **arrays):
    """The published layout with some arrays replaced (None: removed); dots in names are written `__`."""
    new = {name.replace("__", "."): array for name, array in arrays.items()}
    content = {**mask_weights.published(), **new}
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    return path


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"decoder__12__bias": None}, r"1 of 25 arrays of .* are missing, the first is decoder\.12\.bias"),
        ({"decoder__3__net__2__weight": None}, r"missing, the first is decoder\.3\.net\.2\.weight"),
        ({"decoder__14__weight": np.zeros(1)}, r"decoder\.14\.weight is no layer of the mask decoder"),
        ({"decoder__4__weight": np.zeros((128, 128, 3, 3))}, r"\(128, 128, 3, 3\) in the file, \(128, 128, 4, 4\) in"),
        ({"decoder__0__weight": np.zeros((128, 9, 1, 1))}, r"decoder\.0\.weight is \(128, 9, 1, 1\) in the file"),
        ({"decoder__0__bias": np.zeros(128, np.int64)}, r"decoder\.0\.bias is I64"),
    ],
)
def test_a_decoder_of_another_shape_is_refused(path, arrays, message):
    with pytest.raises(WeightsError, match=message):
        load_mask_decoder(changed(path, **arrays))


@pytest.mark.parametrize(
    "codebook", [np.zeros((127, 6)), np.zeros((128, 0)), np.zeros(128), np.zeros((128, 2000), np.float32)]
)
def test_a_codebook_of_another_shape_is_refused(path, codebook):
    changed(path, **{"_vq_vae._embedding": codebook})
    with pytest.raises(WeightsError, match=r"a codebook is \(128, width\)"):
        load_mask_decoder(path)


@pytest.mark.parametrize("weight", [None, np.zeros((8, 1, 4)), np.zeros(1, np.int64)])
def test_the_encoder_of_the_file_is_not_looked_at(path, weight):
    load_mask_decoder(changed(path, encoder__0__weight=weight))


def test_half_precision_files_are_widened(path):
    arrays = {name: array.astype(np.float16) for name, array in mask_weights.published().items()}
    np.savez(path, **arrays)
    decoder = load_mask_decoder(path)
    assert decoder.enter.weight.dtype == torch.float32
    np.testing.assert_array_equal(decoder.enter.weight.numpy(), arrays["decoder.0.weight"].astype(np.float32))
