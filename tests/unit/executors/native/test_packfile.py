"""A packed file: what is written is read, at aligned places, under its name only when it is whole."""

import numpy as np
import pytest

from gemkit.errors import WeightsError
from gemkit.executors.native.lower import lower
from gemkit.executors.native.packfile import ALIGN, KINDS, PLAIN, STEP_WORDS, Pack, Writer
from gemkit.program.ir import Node, Program, Value, Weight

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
