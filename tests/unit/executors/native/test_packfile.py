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
from gemkit.executors.native.packfile import ALIGN, KINDS, PLAIN, STEP_WORDS, Pack, Writer
from gemkit.program.ir import Node, Program, Value, Weight
from support.native_models import ids, randomised
from support.tiny import tiny

X, Y = Value(1, ("T", 32), "float32"), Value(2, ("T", 32), "float32")
TABLE, NORM = Weight("embed.weight", (4, 32), "Q8_0", 136), Weight("norm.weight", (32,), "float32", 128)
EMBED = {"tokens_T": Value(0, ("T",), "int64"), "table_VD": TABLE, "scale": 1.0, "scale_dtype": "run"}
PROGRAM = Program((Node("embed", EMBED, (X,)), Node("rms_norm", {"x": X, "weight_D": NORM, "eps": 1e-6}, (Y,))), {}, Y)
SIZES = {TABLE: (KINDS.index("Q8_0"), 4, 32, 700), NORM: (PLAIN, 1, 32, 128)}


def write(path, tower: Program | None = None, fill: int = 7) -> Pack:
    writer = Writer(lower(PROGRAM), None if tower is None else lower(tower), SIZES, "made of this", ["a note"])
    with writer.file(path) as whole:
        for entry in writer.entries:
            writer.room(whole, entry)[:] = fill
    return Pack(path)


def test_what_is_written_is_read(tmp_path):
    found = write(tmp_path / "model")
    assert (found.source, found.notes, found.tower) == ("made of this", ["a note"], None)
    assert [(e.name, e.kind, e.rows, e.cols, e.nbytes) for e in found.table] == [
        ("embed.weight", *SIZES[TABLE]),
        ("norm.weight", *SIZES[NORM]),
    ]
    assert found.nbytes == 828
    for entry in found.table:
        assert entry.offset % ALIGN == 0
        assert (found.bytes_of(entry) == 7).all()
        assert not found.bytes_of(entry).flags.writeable
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


def test_a_file_that_is_not_finished_has_no_name(tmp_path):
    write(tmp_path / "model")
    writer = Writer(lower(PROGRAM), None, SIZES, "", [])
    with pytest.raises(RuntimeError), writer.file(tmp_path / "model"):
        raise RuntimeError
    assert Pack(tmp_path / "model").source == "made of this"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GKPACK01", b"GKPACK99", "is no packed model"),
        (b'"version": ', b'"version":9', "another version"),
        (b'"embed.weight", 6', b'"embed.weight", 99', "is described by"),
    ],
)
def test_what_is_damaged_is_refused(tmp_path, old, new, message):
    write(tmp_path / "model")
    data = (tmp_path / "model").read_bytes()
    assert old in data
    length = int.from_bytes(data[8:16], "little") + (len(new) - len(old)) * (old in data[16:])
    broken = data[:8].replace(old, new) + length.to_bytes(8, "little") + data[16:].replace(old, new)
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
@given(st.integers(0, 3000), st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_refused_or_harmless(at, data):
    path = _packed()
    original = path.read_bytes()
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
