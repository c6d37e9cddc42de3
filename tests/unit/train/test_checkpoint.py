"""FileCheckpoints under everything that happens to disks and processes."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open

from gemkit.errors import NoSpaceError, TrainingError
from gemkit.train import checkpoint
from gemkit.train.checkpoint import MANIFEST, FileCheckpoints, Saved, read_tensors, replace_bytes, write_tensors


def saved(step: int, value: float = 0.5) -> Saved:
    weights = {
        "a.weight": torch.full((3, 5), value),
        "b.weight": torch.full((7,), value, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4),
    }
    optimizer = {
        "exp_avg.a.weight": torch.full((3, 5), -value, dtype=torch.float64),
        "step.a.weight": torch.tensor(3.0),
    }
    return Saved(step, weights, optimizer, {"data": {"position": step}, "third": 1 / 3})


def same(one: Saved, other: Saved) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
        for a, b in ((one.weights, other.weights), (one.optimizer, other.optimizer))
    )


@pytest.fixture
def kept(tmp_path):
    """Two checkpoints, of steps 10 and 20."""
    made = FileCheckpoints(tmp_path / "checkpoints", keep=2)
    for step in (10, 20):
        made.save(saved(step))
    return made


def left_over(made: FileCheckpoints) -> list[str]:
    return sorted(path.name for path in made.folder.iterdir() if not path.name.startswith("step-"))


def test_what_is_saved_is_read_again(kept):
    found = kept.newest()
    assert found.step == 20
    assert same(found, saved(20))
    assert (found.state["data"], found.state["third"]) == ({"position": 20}, 1 / 3)
    assert left_over(kept) == []


def test_files_are_plain_safetensors_and_json(kept):
    folder = kept.path(20)
    with safe_open(folder / "weights.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["a.weight", "b.weight", "none"]
        assert torch.equal(file.get_tensor("b.weight"), saved(20).weights["b.weight"])
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted([*files, MANIFEST]) == sorted(path.name for path in folder.iterdir())
    for name, said in files.items():
        assert said == {"bytes": (folder / name).stat().st_size, "sha256": checkpoint.sha256(folder / name)}


def test_the_newest_few_stay(kept):
    kept.save(saved(30))
    assert kept.steps() == [20, 30]


def test_a_step_is_not_written_twice(kept):
    before = (kept.path(20) / MANIFEST).stat().st_mtime_ns
    kept.save(saved(20))
    assert (kept.path(20) / MANIFEST).stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "manifest", "not json"])
def test_a_damaged_one_is_passed_over(kept, damage):
    folder = kept.path(20)
    weights = folder / "weights.safetensors"
    match damage:
        case "truncated":
            os.truncate(weights, weights.stat().st_size - 3)
        case "changed":
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
        case "missing":
            weights.unlink()
        case "manifest":
            (folder / MANIFEST).write_text('{"files": {}}')
        case "not json":
            (folder / MANIFEST).write_bytes(b"\0\0\0")
    with pytest.warns(UserWarning, match="step-00000020.*the checkpoint before it is taken"):
        found = kept.newest()
    assert found.step == 10
    assert same(found, saved(10))
    assert kept.steps() == [10]  # the run comes to step 20 again, and must be able to save it
    kept.save(saved(20))
    assert kept.newest().step == 20


def test_none_that_is_whole(kept, tmp_path):
    for step in (10, 20):
        os.truncate(kept.path(step) / "state.json", 1)
    with pytest.warns(UserWarning, match="state.json has 1 bytes"), pytest.raises(TrainingError, match="no complete"):
        kept.newest()
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        FileCheckpoints(tmp_path / "empty").newest()


class Died(Exception):
    """The process is gone: nothing is tidied up."""


@pytest.mark.parametrize("at", range(16))
def test_death_at_any_moment_leaves_the_old_or_the_new(tmp_path, monkeypatch, at):
    """The process ends before its n-th change of the disk; whatever is there then is what a new process finds."""
    folder = tmp_path / "checkpoints"
    made = FileCheckpoints(folder, keep=1)
    made.save(saved(10))
    left = [at]

    def fatal(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Died
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(checkpoint.FileCheckpoints, "_sweep", lambda self: None)  # a dead process sweeps nothing
    monkeypatch.setattr(os, "replace", fatal(os.replace))
    monkeypatch.setattr(os, "fsync", fatal(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", fatal(shutil.rmtree))
    monkeypatch.setattr(checkpoint._Hashed, "write", fatal(checkpoint._Hashed.write))
    died = False
    try:
        made.save(saved(20))
    except Died:
        died = True
    monkeypatch.undo()
    found = FileCheckpoints(folder, keep=1).newest()
    assert found.step in ((10, 20) if died else (20,))
    assert same(found, saved(found.step))
    after = FileCheckpoints(folder, keep=1)
    after.save(saved(30))
    assert after.steps() == [30]
    assert left_over(after) == []


def test_a_full_disk_is_said_before_it_is_written(kept, monkeypatch):
    usage = shutil.disk_usage(kept.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(NoSpaceError, match=r"needs 65\.\d kB, 1\.00 kB free"):
        kept.save(saved(30))
    assert kept.steps() == [10, 20]


def test_a_disk_that_fills_on_the_way(kept, monkeypatch):
    write = checkpoint._Hashed.write

    def full(hashed, data):
        if hashed.entry()["bytes"] > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(hashed, data)

    monkeypatch.setattr(checkpoint._Hashed, "write", full)
    with pytest.raises(NoSpaceError, match=r"no space in .*checkpoints: needs"):
        kept.save(saved(30))
    assert kept.steps() == [10, 20]
    assert left_over(kept) == []
    monkeypatch.undo()
    kept.save(saved(30))
    assert kept.steps() == [20, 30]


def test_a_disk_that_cannot_be_written(kept, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint._Hashed, "write", broken)
    with pytest.raises(TrainingError, match=r"cannot write to .*Input/output error"):
        kept.save(saved(30))
    assert kept.newest().step == 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_not_saved(kept, value):
    with pytest.raises(TrainingError, match=r"the weight a\.weight has numbers that are not finite"):
        kept.save(saved(30, value))
    assert kept.steps() == [10, 20]


def test_large_numbers_are_finite():
    assert checkpoint.is_finite(torch.full((1000,), 3e38))
    assert checkpoint.is_finite(torch.full((1000,), 3e38, dtype=torch.bfloat16))
    assert not checkpoint.is_finite(torch.tensor([3e38, float("inf"), -float("inf")]))


def test_every_dtype(tmp_path):
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]
    tensors = {str(kind): torch.arange(6).reshape(2, 3).T.to(kind) for kind in [*kinds, torch.int8, torch.bool]}
    write_tensors(tmp_path / "all", tensors)
    found = read_tensors(tmp_path / "all")
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "curve.svg"
    replace_bytes(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError):
        replace_bytes(path, b"new")
    assert path.read_bytes() == b"old"
