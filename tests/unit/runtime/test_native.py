"""Opening a checkpoint natively: packed once, found again, and what goes wrong in between."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemkit.errors import WeightsError
from gemkit.executors.native import writer
from gemkit.runtime import native, pack_cache
from gemkit.runtime.options import LoadOptions
from gemkit.weights.checkpoint import find
from support.tiny_models import write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "gemma-3-1b"
    write(folder, "gemma-3-1b")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(folder, **options):
    with find(folder) as checkpoint:
        return native.load_native(checkpoint, LoadOptions(), **options)


def test_progress_counts_the_bytes_that_are_packed(folder, home, monkeypatch):
    monkeypatch.setattr(writer, "_PIECE", 5000)
    told = []
    opened(folder, progress=lambda done, total: told.append((done, total)))
    assert len({total for _, total in told}) == 1
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert done[-1] == told[0][1]
    assert len(told) > 50
    told.clear()
    opened(folder, progress=lambda done, total: told.append((done, total)))
    assert told == [], "the second time nothing is packed"


def test_an_interruption_leaves_nothing(folder, home):
    def interrupt(done: int, total: int):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(folder, progress=interrupt)
    assert list(home.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told_once(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "file" / "cache"))
    executor, report = opened(folder)
    (note,) = [note for note in report.notes if "in memory alone" in note]
    assert "cannot write to" in note
    assert "GEMKIT_CACHE names another folder" in note
    assert executor.pack.nbytes == opened(folder)[1].nbytes


@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_falls_back_to_memory(folder, home):
    """The limit on the size of a file is an error of the same call."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        executor, report = opened(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert any("in memory alone" in note and "File too large" in note for note in report.notes)
    assert list(home.iterdir()) == []
    kept = opened(folder)[0]
    assert kept.pack.damaged() == executor.pack.damaged() == []
    for ours, theirs in zip(executor.pack.table, kept.pack.table, strict=True):
        assert (ours.name, ours.checksum) == (theirs.name, theirs.checksum)


def test_a_file_that_changes_while_it_is_packed_is_refused(folder, home, tmp_path):
    copy = tmp_path / "copy"
    write(copy, "gemma-3-1b")
    (weights,) = copy.glob("*.safetensors")

    def touch(done: int, total: int):
        os.utime(weights, (done, done))

    with pytest.raises(WeightsError, match="changed while it was being read"):
        opened(copy, progress=touch)
    assert list(home.iterdir()) == []
    with open(weights, "r+b") as file, find(copy) as checkpoint:
        file.truncate(weights.stat().st_size // 2)
        with pytest.raises(WeightsError, match=r"changed while it was being read|its file ends before it"):
            native.load_native(checkpoint, LoadOptions())
    assert list(home.iterdir()) == []


def test_what_was_cut_short_or_changed_is_packed_anew(folder, home):
    opened(folder)
    (path,) = home.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    opened(folder)
    assert path.read_bytes() == whole


_PROGRAM = """
import sys, time
from gemkit.executors.native import writer
from gemkit.runtime import native
from gemkit.runtime.options import LoadOptions
from gemkit.weights.checkpoint import find
def slowly(done, total):
    print(done, flush=True)
    time.sleep(float(sys.argv[2]))
with find(sys.argv[1]) as checkpoint:
    executor, report = native.load_native(checkpoint, LoadOptions(), progress=slowly)
print("whole" if not executor.pack.damaged() and not report.notes else "not whole", "torch" in sys.modules, flush=True)
"""


def begin(folder: Path, pause: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", _PROGRAM, folder, str(pause)], stdout=subprocess.PIPE, text=True)


def test_a_process_that_is_killed_leaves_nothing_that_is_taken_for_whole(folder, home):
    killed = begin(folder, 10)
    assert killed.stdout is not None
    killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (left,) = pack_cache.kept()
    assert left.unfinished
    opened(folder)
    (kept,) = pack_cache.kept()
    assert pack_cache.damage(kept) == ""
    assert kept.sources == [str(path) for path in folder.glob("*.safetensors")]


def test_two_processes_pack_one_model_once(folder, home):
    both = [begin(folder, 0.003) for _ in range(2)]
    said = sorted((process.communicate()[0].split("\n")[:-1] for process in both), key=len)
    assert [lines[-1].split()[0] for lines in said] == ["whole", "whole"]
    assert len(said[0]) == 1, "one waited, and packed nothing"
    assert len(said[1]) > 10
    assert len(list(home.iterdir())) == 1
    assert time.time() - pack_cache.kept()[0].used < 600
