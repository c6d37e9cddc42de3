"""Packing from where rows lie: blocks and planes of files and of memory come to the same bytes, and the sketch to its
definition."""

import gguf
import numpy as np
import pytest
import torch

from gemkit.block_types import KINDS
from gemkit.executors.native import screening
from gemkit.executors.native.packfile import checksum
from gemkit.executors.native.writer import Source, has_blocks
from gemkit.ops import Quantized
from gemkit.weights.formats.gguf_blocks import BLOCKS, block_bytes, load_blocks
from support import native_library as native

PACKED_AS_THEY_LIE = [name for name in BLOCKS if has_blocks(name)]


def random_blocks(kind: str, rows: int, cols: int) -> np.ndarray:
    """Blocks of any bits, but scales that are numbers."""
    rng = np.random.default_rng(len(kind) + rows)
    blocks = rng.integers(0, 256, (rows, cols // KINDS[kind].row_multiple, block_bytes(kind)), dtype=np.uint8)
    start = 0
    for _, nbytes, _ in BLOCKS[kind]:
        if nbytes == 2:  # half the exponents: no infinity
            blocks[..., start + 1] &= 0xBB
        start += nbytes
    return blocks


def planes_of(kind: str, blocks: np.ndarray, rows: int, cols: int) -> dict[str, np.ndarray]:
    weight = Quantized.empty(KINDS[kind], (rows, cols))
    load_blocks(weight, blocks.reshape(-1))
    return {name: plane.numpy() for name, plane in weight.planes.items()}


def test_the_common_kinds_are_packed_as_they_lie():
    """A kind that is not goes through Python: right, but slow."""
    common = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}
    assert common <= set(PACKED_AS_THEY_LIE)


@pytest.mark.parametrize("kind", PACKED_AS_THEY_LIE)
@pytest.mark.parametrize("rows", [1, 16, 53])
def test_blocks_are_packed_like_their_planes(tmp_path, kind, rows):
    """From a file, in the middle of it, by several threads and in ranges of rows; each row is what the gguf package
    makes of its blocks, to the bit."""
    cols = 2 * KINDS[kind].row_multiple if KINDS[kind].superblock else 32 * 11
    blocks = random_blocks(kind, rows, cols)
    (tmp_path / "file").write_bytes(b"before" + blocks.tobytes())
    planes = planes_of(kind, blocks, rows, cols)
    expected = native.pack(kind, rows, cols, planes)
    assert expected is not None
    with open(tmp_path / "file", "rb") as file:
        for cuts in [(), (16, 32)] if rows > 32 else [()]:
            packed, _, sums = native.pack_from(
                kind, rows, cols, Source.blocks(file.fileno(), 6), cuts=cuts, threads=1 + len(cuts)
            )
            assert np.array_equal(packed, expected)
            assert sums == [checksum(expected), 0]
        (tmp_path / "planes").write_bytes(b"".join(plane.tobytes() for plane in planes.values()))
        with open(tmp_path / "planes", "rb") as other:
            at, places = 0, {}
            for name, plane in planes.items():
                places[name] = other.fileno(), at
                at += plane.nbytes
            assert np.array_equal(native.pack_from(kind, rows, cols, Source.of_files(places))[0], expected)
    theirs = gguf.quants.dequantize(blocks.reshape(rows, -1), getattr(gguf.GGMLQuantizationType, kind))
    for row in range(rows):
        assert np.array_equal(native.row("portable", kind, packed, rows, cols, row), theirs[row])


@pytest.mark.parametrize(("stored", "kind"), [("F32", "F32"), ("F16", "F32"), ("BF16", "BF16")])
def test_dense_rows_of_a_file(tmp_path, stored, kind):
    rows, cols = 37, 70
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    values = values.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored])
    raw = values.view(torch.uint8).numpy()
    (tmp_path / "file").write_bytes(raw.tobytes())
    with open(tmp_path / "file", "rb") as file:
        packed, _, sums = native.pack_from(kind, rows, cols, Source.of_files({"dense": (file.fileno(), 0)}, stored))
    for row in range(rows):
        assert np.array_equal(native.row("portable", kind, packed, rows, cols, row), values[row].float().numpy())
    assert sums[0] == checksum(packed)


def test_a_file_that_ends_before_its_rows_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(bytes(34 * 15))
    with open(tmp_path / "file", "rb") as file:
        assert native.pack_from("Q8_0", 16, 32, Source.blocks(file.fileno(), 0))[0] is None


@pytest.mark.parametrize(("kind", "cols"), [("Q8_0", 96), ("Q6_K", 256), ("F32", 40), ("BF16", 20)])
def test_a_sketch_is_what_its_definition_says(kind, cols):
    """Codes, scales and errors as `kernels/sketch.h` describes them, computed by NumPy in float64. A number within a
    millionth of the border of two levels may have either code; a row of zeros has none of anything."""
    rows = 35
    rng = np.random.default_rng(5)
    if kind in KINDS:
        blocks = random_blocks(kind, rows, cols)
        blocks[3] = 0
        planes = planes_of(kind, blocks, rows, cols)
        dense = gguf.quants.dequantize(blocks.reshape(rows, -1), getattr(gguf.GGMLQuantizationType, kind))
        source = native.Source(native.planes_of(planes))
    else:
        dense = rng.normal(size=(rows, cols)).astype(np.float32)
        dense[3] = 0
        dense = torch.from_numpy(dense).bfloat16().float().numpy() if kind == "BF16" else dense
        held = torch.from_numpy(dense).bfloat16().view(torch.int16).numpy() if kind == "BF16" else dense
        source = native.Source(native.planes_of({"dense": held}, "bfloat16" if kind == "BF16" else "float32"))
    signs = screening.signs(cols)
    _, sketch, sums = native.pack_from(kind, rows, cols, source, signs=signs)
    assert sums[1] == checksum(sketch)
    block = cols & -cols
    hadamard = np.array([[(-1) ** bin(i & k).count("1") for k in range(block)] for i in range(block)]) / block**0.5
    turned = ((dense * signs).astype(np.float64).reshape(rows, -1, block) @ hadamard).reshape(rows, cols)
    tiles = sketch.reshape(-1, screening.tile_bytes(cols))
    scales, errors = (
        tiles[:, at : at + 32].copy().view(np.float16).astype(np.float64).ravel()[:rows] for at in (0, 32)
    )
    bits = tiles[:, 64:].reshape(len(tiles), -1, 16, 4)  # chunk, row, j: columns j, 4 + j, 8 + j, 12 + j
    codes = np.stack([bits >> shift & 3 for shift in (0, 2, 4, 6)], 3)  # tile, chunk, row, i, j
    codes = codes.transpose(0, 2, 1, 3, 4).reshape(-1, 16 * bits.shape[1])[:rows, :cols]
    live = np.arange(rows) != 3
    level = turned[live] / (0.9957 * np.sqrt((turned[live] ** 2).mean(1, keepdims=True))) + 2
    exact = np.clip(np.floor(level), 0, 3)
    assert (np.abs(level - np.round(level))[codes[live] != exact] < 1e-5).all()
    points = codes[live] - 1.5
    along = (turned[live] * points).sum(1)
    assert np.allclose(scales[live], (turned[live] ** 2).sum(1) / along, rtol=1e-3)
    left = np.sqrt(((turned[live] - scales[live, None] * points) ** 2).mean(1))
    assert (errors[live] >= left * (1 - 1e-6)).all(), "a bound must not be too small"
    assert np.allclose(errors[live], left, rtol=3e-3)
    assert not scales[3]
    assert not errors[3]
