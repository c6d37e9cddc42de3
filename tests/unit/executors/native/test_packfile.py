"""A packed file: what is written is read, under its name when it is whole; a damaged one stays within its bounds."""

import contextlib
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from gemkit.errors import ModelError, WeightsError
from gemkit.executors.interface import Chunk, LogitsFilter
from gemkit.executors.native.executor import NativeExecutor
from gemkit.executors.native.lower import lower
from gemkit.executors.native.packer import pack
from gemkit.executors.native.packfile import ALIGN, KINDS, PLAIN, STEP_WORDS, Pack, checksum
from gemkit.executors.native.writer import Source, write_pack
from gemkit.program.ir import Node, Program, Value, Weight
from support.native_models import ids, randomised
from support.tiny import tiny

X, Y = Value(1, ("T", 32), "float32"), Value(2, ("T", 32), "float32")
TABLE, NORM = Weight("embed.weight", (4, 32), "Q8_0", 136), Weight("norm.weight", (32,), "float32", 128)
EMBED = {"tokens_T": Value(0, ("T",), "int64"), "table_VD": TABLE, "scale": 1.0, "scale_dtype": "run"}
PROGRAM = Program((Node("embed", EMBED, (X,)), Node("rms_norm", {"x": X, "weight_D": NORM, "eps": 1e-6}, (Y,))), {}, Y)


class Sevens:
    """Weights of bytes of 7."""

    codes, scales, norm = np.full((4, 32), 7, np.int8), np.full((4, 1), 0x0707, np.uint16), np.full(128, 7, np.uint8)

    def rows(self, weight: Weight) -> Source:
        return Source.memory({"codes": self.codes.ctypes.data, "scales": self.scales.ctypes.data}, self)

    def floats(self, weight: Weight) -> np.ndarray:
        return self.norm.view(np.float32)

    def notes(self) -> list[str]:
        return ["a note"]

    def frequencies(self, rates) -> np.ndarray:
        raise AssertionError


def write(path, tower: Program | None = None) -> Pack:
    programs = [lower(PROGRAM)] if tower is None else [lower(PROGRAM), lower(tower)]
    return write_pack(programs, Sevens(), path, "made of this")


def test_what_is_written_is_read(tmp_path):
    found = write(tmp_path / "model")
    assert (found.source, found.notes, found.tower) == ("made of this", ["a note"], None)
    assert [(e.name, e.kind, e.rows, e.cols, e.nbytes) for e in found.table] == [
        ("embed.weight", KINDS.index("Q8_0"), 4, 32, 64 + 16 * 32),
        ("norm.weight", PLAIN, 1, 32, 128),
    ]
    assert found.nbytes == 704
    for entry, sevens in zip(found.table, (4 * 34, 128), strict=True):
        assert entry.offset % ALIGN == 0
        assert (found.bytes_of(entry) == 7).sum() == sevens
        assert not found.bytes_of(entry).flags.writeable
        assert checksum(found.bytes_of(entry)) == entry.checksum
    assert found.steps.shape == (2, STEP_WORDS)
    assert found.buffers.tolist() == [[32, 0, 0], [32, 0, 2]]
    pointers = found.pointers()
    assert pointers[0, 0] == KINDS.index("Q8_0") | 4 << 32
    assert pointers[1].tolist() == [0xFFFFFFFF | 1 << 32, 32, found.bytes_of(found.table[1]).ctypes.data, 128]


def test_two_programs_share_one_table(tmp_path):
    found = write(tmp_path / "model", tower=PROGRAM)
    assert found.tower is not None
    assert np.array_equal(found.tower[0], found.steps)
    assert np.array_equal(found.tower[1], found.buffers)
    assert len(found.table) == 2


@pytest.mark.parametrize("at", [0, 7, 8, 4_194_303, 4_194_304, 4_194_999])
def test_one_changed_byte_changes_the_checksum(at):
    """By the definition, in Python's own integers."""
    data = np.random.default_rng(0).integers(0, 256, 4_195_001, dtype=np.uint8)
    words = np.concatenate([data, np.zeros(7, np.uint8)]).view(np.uint64).tolist()
    before = checksum(data)
    assert before == sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**64
    data[at] ^= 64
    assert checksum(data) != before


def test_what_has_changed_on_the_disk_is_named(tmp_path):
    found = write(tmp_path / "model")
    assert found.damaged() == []
    with open(tmp_path / "model", "r+b") as file:
        file.seek(found.table[1].offset + 5)
        file.write(b"x")
    assert Pack(tmp_path / "model").damaged() == ["norm.weight"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GKPACK02", b"GKPACK99", "is no packed model"),
        (b'"version": ', b'"version":9', "another version"),
        (b'"embed.weight", 6', b'"embed.weight", 99', "is described by"),
    ],
)
def test_what_is_damaged_is_refused(tmp_path, old, new, message):
    write(tmp_path / "model")
    data = (tmp_path / "model").read_bytes()
    assert old in data
    broken = data.replace(old, new)
    (tmp_path / "broken").write_bytes(broken)
    with pytest.raises(WeightsError, match=message):
        Pack(tmp_path / "broken")


def test_a_damaged_program_is_refused_or_runs_within_its_bounds(tmp_path):
    """Whatever a word of a step, a buffer or the table says: an error of ours, never memory of others."""
    module = randomised("gemma-2-2b", quantized=True)
    whole = pack(module, tmp_path / "model")
    (prompt,) = ids(5)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = Pack(tmp_path / "model")
        for name in rng.choice(["steps", "buffers"], 1):
            array = getattr(whole, name).copy()
            row, column = rng.integers(array.shape[0]), rng.integers(array.shape[1])
            array[row, column] = rng.choice([-1, 0, 1, 7, 2**31 - 1, -(2**31), int(rng.integers(-100, 10_000))])
            setattr(damaged, name, array)
        try:
            executor = NativeExecutor(module.config, damaged)
        except ModelError:
            refused += 1
            continue
        with contextlib.suppress(ModelError):
            executor.run([Chunk(0, prompt, rows=2)], executor.new_state(1))
        with contextlib.suppress(ModelError):
            executor.run([Chunk(0, prompt, rows=2, filter=LogitsFilter(3))], executor.new_state(1))
        with contextlib.suppress(ModelError):
            executor.run([Chunk(0, prompt, rows=2)], executor.new_state(1), output="hidden")
    assert refused > 100


@settings(max_examples=60)
@given(st.integers(-3000, 1000), st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_refused_or_harmless(at, data):
    """From the header at the end, around to the programs at the beginning."""
    path = _packed()
    original = path.read_bytes()
    at %= len(original)
    broken = path.with_name("broken")
    broken.write_bytes(original[:at] + data + original[at + len(data) :])
    try:
        opened = Pack(broken)
        NativeExecutor(tiny("gemma-2b"), opened)
    except (WeightsError, ModelError):
        pass


def test_a_file_cut_short_is_refused():
    path = _packed()
    original = path.read_bytes()
    cut = path.with_name("cut")
    for size in (0, 7, 16, 100, len(original) // 2, len(original) - 1):
        cut.write_bytes(original[:size])
        with pytest.raises(WeightsError):
            Pack(cut)


_FOLDER = []


def _packed():
    if not _FOLDER:
        _FOLDER.append(tempfile.TemporaryDirectory())
        pack(randomised("gemma-2b"), Path(_FOLDER[0].name) / "model")
    return Path(_FOLDER[0].name) / "model"
