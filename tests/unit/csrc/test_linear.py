"""Linears of packed weights, on every instruction set that this machine has, against their mathematics in NumPy.

The dense weights come from `Quantized.dequantize`, which tests of its own hold against ggml's implementation.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gemkit.block_types import KINDS
from gemkit.executors.native import dequantize
from gemkit.ops.quantized import Quantized
from support import native_library as native

QUANTIZED = [kind for kind in native.KINDS if kind in KINDS]
DENSE = ("F32", "BF16")
TOKENS = (1, 2, 3, 5, 8, 17, 64)


def columns_of(kind: str) -> tuple[int, ...]:
    if kind in DENSE:
        return (1, 31, 33, 200)
    return (256, 768) if KINDS[kind].superblock else (32, 96, 256, 320)  # one block, and blocks of fewer groups


class Sample:
    """A random weight of a kind: its planes, the packed bytes, and its numbers in float64."""

    def __init__(self, kind: str, rows: int, cols: int, seed: int = 0, scale=(1e-3, 1e-2)):
        self.kind, self.rows, self.cols = kind, rows, cols
        rng = np.random.default_rng([seed, rows, cols])
        self.dense_type = "bfloat16" if kind == "BF16" else "float32"
        if kind in DENSE:
            floats = torch.from_numpy(rng.standard_normal((rows, cols), np.float32))
            if kind == "BF16":
                self.planes = {"dense": floats.to(torch.bfloat16).view(torch.uint16).numpy()}
                self.floats = floats.to(torch.bfloat16).float().numpy()
            else:
                self.planes = {"dense": floats.numpy()}
                self.floats = floats.numpy()
            self.zero = self.group = None
        else:
            data = KINDS[kind]
            weight = Quantized.empty(data, (rows, cols))
            for name, plane in weight.planes.items():
                array = plane.numpy()
                if array.dtype == np.float16:
                    array[:] = rng.uniform(*scale, array.shape) * rng.choice((-1, 1), array.shape)
                elif name in ("scales", "mins"):
                    whole = (-128, 128) if array.dtype == np.int8 else (0, 64)
                    low, high = {"Q2_K": (0, 16), "Q3_K": (-32, 32)}.get(kind, whole)
                    array[:] = rng.integers(low, high, array.shape)
                else:
                    info = np.iinfo(array.dtype)
                    array[:] = rng.integers(info.min, info.max + 1, array.shape)
            self.weight = weight
            self.planes = {name: plane.numpy() for name, plane in weight.planes.items()}
            with dequantize.enabled(False):
                self.floats = weight.dequantize().numpy()
        packed = native.pack(kind, rows, cols, self.planes, self.dense_type)
        assert packed is not None
        self.packed = packed

    def minima(self) -> np.ndarray:
        """Of each group, in float32: (rows, groups)."""
        mins = self.planes["mins"].astype(np.float32)
        if "super_mins" in self.planes:
            blocks = self.planes["super_mins"].astype(np.float32)[..., None]
            mins = (mins.reshape(*blocks.shape[:2], -1) * blocks).reshape(mins.shape)
        return mins

    def linear(self, isa, x_TD, **how):
        return native.linear(isa, self.kind, self.packed, self.rows, x_TD, **how)


def rounded(x_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes of activations (T, D) and their scales (T, D / 32), in the float32 arithmetic of the kernels."""
    groups = x_TD.reshape(len(x_TD), -1, 32)
    most = np.abs(groups).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.where(most >= np.float32(2.0**-100), np.float32(127) / most, np.float32(0))
    codes = np.rint(groups * inverse).astype(np.int64)
    return codes.reshape(x_TD.shape), np.where(inverse > 0, most / np.float32(127), np.float32(0))[..., 0]


def sample_activations(tokens: int, cols: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng([seed, tokens, cols])
    x_TD = rng.standard_normal((tokens, cols), np.float32)
    return x_TD * np.exp2(rng.integers(-8, 8, (tokens, 1))).astype(np.float32)


@pytest.fixture(scope="module", params=native.ISAS)
def isa(request):
    """Every set; one that the machine has not must be refused, not run."""
    name = request.param
    if name not in native.isas():
        x_TD = np.zeros((1, 32), np.float32)
        assert not native.library().gk_test_quantize(name.encode(), x_TD.ctypes.data, 1, 32, 0, 1, None)
        return "portable"
    return name


@pytest.mark.parametrize("kind", native.KINDS)
def test_packing_loses_nothing(kind):
    for rows in (1, 15, 16, 17, 100):
        for cols in columns_of(kind):
            sample = Sample(kind, rows, cols)
            back = native.unpack(kind, rows, cols, sample.packed, sample.planes, sample.dense_type)
            for name, plane in sample.planes.items():
                assert np.array_equal(plane.view(np.uint8), back[name].view(np.uint8)), (rows, cols, name)
            if rows > 32:  # filled in ranges, as threads do: the same bytes
                cut = native.pack(kind, rows, cols, sample.planes, sample.dense_type, cuts=(16, 64))
                assert np.array_equal(cut, sample.packed)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_planes_are_made_dense_to_the_bit(kind, isa):
    for rows, cols in [(1, columns_of(kind)[0]), *((19, cols) for cols in columns_of(kind))]:
        sample = Sample(kind, rows, cols)
        for cuts, offset in [((), 0), ((1,) if rows > 1 else (), 4)]:
            found = native.dense(isa, kind, sample.planes, rows, cols, cuts, offset)
            assert np.array_equal(found.view(np.uint32), sample.floats.view(np.uint32)), (rows, cols)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_packed_weights_are_as_small_as_the_files(kind):
    """Tiles are padded to 64 bytes, nothing else is added: at the width of Gemma 2 2B at most 0.3 %. (Points of a grid
    are not held as such, and scales of codebooks are whole bytes: those are as small as their planes.)"""
    from gemkit.weights.formats.gguf_blocks import block_bytes

    data = KINDS[kind]
    file = 2304 // (data.superblock or 32) * block_bytes(kind) * 160
    if data.values and data.superblock:
        file = 2304 * 160 * data.bits_per_weight / 8
    assert file <= native.packed_bytes(kind, 160, 2304) < file * 1.003


def test_packing_refuses_what_it_cannot_hold():
    lib = native.library()
    q4_k = native.KINDS.index("Q4_K")
    assert lib.gk_packed_bytes(q4_k, 16, 128) == 0  # no whole superblock
    assert lib.gk_packed_bytes(len(native.KINDS), 16, 256) == lib.gk_packed_bytes(-1, 16, 256) == 0
    assert lib.gk_packed_bytes(q4_k, -16, 256) == lib.gk_packed_bytes(q4_k, 1 << 62, 1 << 62) == 0
    planes = Sample("Q4_K", 16, 256).planes
    planes["scales"][3, 2] = 64  # seven bits
    assert native.pack("Q4_K", 16, 256, planes) is None
    planes["scales"][3, 2] = 63
    assert native.pack("Q4_K", 16, 256, planes) is not None
    dense = {"dense": np.zeros((32, 40), np.float32)}
    assert native.pack("BF16", 32, 40, dense) is None  # would round
    assert native.pack("F32", 32, 40, dense, cuts=(8,)) is None  # half a tile


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_f32_holds_the_shorter_floats_exactly(dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(256, 256)
    packed = native.pack("F32", 256, 256, {"dense": every.numpy()}, str(dtype).removeprefix("torch."))
    back = native.unpack("F32", 256, 256, packed, {"dense": np.empty((256, 256), np.float32)})["dense"]
    np.testing.assert_array_equal(back, every.view(dtype).float().numpy())


@pytest.mark.parametrize("kind", native.KINDS)
def test_rows_are_the_numbers_of_the_kind(kind, isa):
    for rows in (1, 17, 100):
        for cols in columns_of(kind):
            sample = Sample(kind, rows, cols)
            for index in {0, rows // 2, rows - 1}:
                found = native.row(isa, kind, sample.packed, rows, cols, index)
                np.testing.assert_array_equal(found, sample.floats[index])  # the same operations: the same numbers


def test_activations_are_rounded_as_said(isa):
    """Codes, scale and sums of every group, read back from the layout of linear.h."""
    for tokens in (1, 15, 16, 21):
        x_TD = sample_activations(tokens, 96)
        x_TD[0, :32] = 0
        raw = native.quantize(isa, x_TD)
        assert np.array_equal(raw, native.quantize(isa, x_TD, cuts=(tokens // 2,)))
        codes_TD, scales_TG = rounded(x_TD)
        groups = raw.reshape(-1, 64)
        at = 0
        for first in range(0, tokens, 16):
            width = min(16, tokens - first)
            for g in range(3):
                for t in range(first, first + width):
                    line = groups[at]
                    codes = codes_TD[t, g * 32 : g * 32 + 32]
                    sums = [codes[:16].sum(), codes[16:].sum(), codes.sum()]
                    assert np.array_equal(line[:32].view(np.int8), codes)
                    assert line[32:36].view(np.float32)[0] == scales_TG[t, g]
                    assert np.array_equal(-line[36:48].view(np.int32), sums)
                    assert np.array_equal(line[48:60].view(np.float32), sums)
                    at += 1


@pytest.mark.parametrize("kind", QUANTIZED)
def test_linear_is_exact_but_for_its_float_sums(kind, isa):
    """Against float64 with the same codes of activations.

    Each group adds at most four float operations (two products, two sums) and every later one a rounding of the total,
    so the error is below (groups + 4) * 2^-24 of the sum of absolute terms.
    """
    for rows in (1, 15, 16, 17, 100):
        for cols in columns_of(kind):
            sample = Sample(kind, rows, cols)
            parts = KINDS[kind].group
            for tokens in TOKENS:
                x_TD = sample_activations(tokens, cols)
                codes_TD, scales_TG = rounded(x_TD)
                x = codes_TD * np.repeat(scales_TG.astype(np.float64), 32, 1)
                w = sample.floats.astype(np.float64)
                terms = np.einsum("tgd,rgd->trg", x.reshape(tokens, -1, parts), w.reshape(rows, -1, parts))
                minima = np.zeros_like(terms)
                if KINDS[kind].minima:  # products and minima are summed apart
                    mins = sample.minima().astype(np.float64)
                    minima = np.abs(x.reshape(tokens, -1, parts).sum(-1)[:, None] * mins)
                size = (np.abs(terms) + 2 * minima).sum(-1)
                # dequantize() itself rounds: two more operations a weight, seen by terms of one weight each
                size_w = np.abs(x) @ np.abs(w).T
                bound = (cols // parts + 4) * 2.0**-24 * size + 3 * 2.0**-24 * (size_w + minima.sum(-1))
                error = np.abs(sample.linear(isa, x_TD) - terms.sum(-1))
                assert (error <= bound).all(), (rows, cols, tokens, (error / np.maximum(bound, 1e-30)).max())


@pytest.mark.parametrize("kind", native.KINDS)
def test_linear_is_the_product_within_the_rounding_of_activations(kind, isa):
    """Rounding an activation moves it by at most half a step of its group: |error| <= sum of |w| * scale / 2."""
    for rows, tokens in ((17, 5), (100, 17), (33, 64)):
        for cols in columns_of(kind):
            sample = Sample(kind, rows, cols, seed=2)
            x_TD = sample_activations(tokens, cols, seed=3)
            w = sample.floats.astype(np.float64)
            exact = x_TD.astype(np.float64) @ w.T
            sizes = np.abs(x_TD).astype(np.float64) @ np.abs(w).T
            bound = 2.0**-23 * cols * sizes  # float32 sums
            if kind in QUANTIZED:
                steps = np.repeat(rounded(x_TD)[1].astype(np.float64), 32, 1)
                bound = bound + (0.5 + 2.0**-16) * steps @ np.abs(w).T
            assert (np.abs(sample.linear(isa, x_TD) - exact) <= bound).all()


@pytest.mark.parametrize("kind", native.KINDS)
def test_bits_depend_on_nothing_but_the_row_and_the_token(kind):
    """The same bits alone and among others, whole and cut, aligned and not, on every instruction set."""
    rows, cols = 100, columns_of(kind)[-1]
    sample = Sample(kind, rows, cols, seed=4)
    x_TD = sample_activations(64, cols, seed=5)
    whole = sample.linear("portable", x_TD)
    for isa in native.isas():
        assert np.array_equal(whole, sample.linear(isa, x_TD)), isa
        assert np.array_equal(whole, sample.linear(isa, x_TD, cuts=(1, 4), offset=4)), isa
        for tokens in range(1, 34):
            assert np.array_equal(whole[:tokens], sample.linear(isa, x_TD[:tokens].copy())), (isa, tokens)
        memory = native.aligned(x_TD.nbytes, 4).view(np.float32).reshape(x_TD.shape)
        memory[:] = x_TD
        assert np.array_equal(whole, sample.linear(isa, memory)), isa


@pytest.mark.parametrize(("kind", "cols"), [("Q4_0", 2880), ("Q8_0", 2336), ("Q4_K", 4864), ("Q6_K", 2560)])
def test_more_tokens_and_columns_than_stay_in_the_second_cache(kind, cols, isa):
    """Several panels of tokens, several parts of the columns (sums are put away between them), tiles in pairs and a
    last one of fewer rows alone: each token has the bits that it has by itself."""
    sample = Sample(kind, 40, cols)
    x_TD = sample_activations(151, cols)
    whole = sample.linear(isa, x_TD)
    for t in (0, 7, 63, 64, 100, 143, 144, 150):
        assert np.array_equal(whole[t : t + 1], sample.linear(isa, x_TD[t : t + 1].copy())), t


@pytest.mark.parametrize("kind", QUANTIZED)
def test_largest_codes_do_not_overflow(kind, isa):
    """All codes at their ends and activations at theirs: what a sum of pairs in 16 bits would not survive."""
    cols = columns_of(kind)[-1]
    sample = Sample(kind, 16, cols)
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        for name in ("codes", "high"):
            if name in sample.planes:
                sample.planes[name].view(np.uint8)[:] = byte
        w = sample.weight.dequantize().double().numpy()
        packed = native.pack(kind, 16, cols, sample.planes)
        for sign in (1, -1):
            x_TD = np.full((19, cols), 127.0 * sign, np.float32)
            x_TD[1, ::2] *= -1
            found, exact = native.linear(isa, kind, packed, 16, x_TD), x_TD.astype(np.float64) @ w.T
            # three roundings a weight and one a group; x is exact
            assert (np.abs(found - exact) <= (cols // 16 + 8) * 2.0**-24 * np.abs(x_TD) @ (np.abs(w) * 3 + 40).T).all()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_scales_at_the_ends_of_float16(kind):
    cols = columns_of(kind)[-1]
    for scale in ((6e-8, 5e-7), (30000, 65504)):  # below the normal numbers, and the largest
        sample = Sample(kind, 17, cols, scale=scale)
        x_TD = sample_activations(4, cols)
        found = sample.linear("portable", x_TD)
        assert np.isfinite(found).all()
        assert np.abs(found).max() > 0
        for isa in native.isas():
            assert np.array_equal(found, sample.linear(isa, x_TD))
            assert np.array_equal(native.row(isa, kind, sample.packed, 17, cols, 16), sample.floats[16])


@pytest.mark.parametrize("kind", native.KINDS)
def test_what_is_not_finite_stays_so_in_its_token_alone(kind, isa):
    cols = columns_of(kind)[-1]
    sample = Sample(kind, 20, cols)
    x_TD = sample_activations(5, cols)
    clean = sample.linear(isa, x_TD)
    for bad in (np.inf, -np.inf, np.nan):
        spoiled = x_TD.copy()
        spoiled[2, cols // 2] = bad
        found = sample.linear(isa, spoiled)
        assert not np.isfinite(found[2]).any()
        assert np.array_equal(np.delete(found, 2, 0), np.delete(clean, 2, 0))


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 2.0**-100, 1e-20, 1e30, 3.4e38])
def test_activations_of_any_size(size, isa):
    """Zeros, denormals (they count as zero) and the largest: the result follows without overflow on the way."""
    sample = Sample("Q4_0", 16, 64, scale=(1e-4, 1e-3))
    shape = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    x_TD = shape * np.float32(size)
    exact = x_TD.astype(np.float64) @ sample.floats.astype(np.float64).T
    bound = np.abs(sample.floats).sum(1) * size / 127 * 0.51 if size >= 2.0**-100 else np.abs(exact) + 1e-45
    assert (np.abs(sample.linear(isa, x_TD) - exact) <= bound).all()


def test_the_environment_names_the_instruction_set():
    """A set that is not there is reported, by no name, and not run."""
    code = (
        "from support import native_library as native; name = native.library().gk_isa();"
        "print(name.decode() if name else None)"
    )
    for forced, expected in (("", native.isas()[-1]), ("portable", "portable"), ("neon", "None")):
        env = {**os.environ, "GEMKIT_ISA": forced, "PYTHONPATH": str(Path(native.__file__).parents[1])}
        ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == expected
