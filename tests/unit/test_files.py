"""Atomic files and folders: complete under their name or not there, whatever ends the writer."""

import errno
import io
import os
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gemkit import files
from gemkit.errors import TextError
from gemkit.files import atomic_file, atomic_folder, is_unfinished, write_safetensors


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_appears_when_the_block_ends(tmp_path, durable):
    with atomic_file(tmp_path / "x", durable=durable) as file:
        file.write(b"new")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_is_replaced_whole_and_keeps_its_permissions(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert mode(path) == 0o640


def test_new_files_and_folders_have_the_permissions_of_the_umask(tmp_path, umask):
    with atomic_file(tmp_path / "x"):
        pass
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "y").write_bytes(b"")
    assert mode(tmp_path / "x") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_nothing_and_what_was_there(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")

    def file():
        with atomic_file(tmp_path / "x") as file:
            file.write(b"new")
            raise error

    def folder():
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "y").write_bytes(b"new")
            raise error

    for write in (file, folder):
        with pytest.raises(error):
            write()
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_file_can_be_mapped_and_read_back_while_it_is_written(tmp_path):
    import mmap

    with atomic_file(tmp_path / "x") as file:
        os.posix_fallocate(file.fileno(), 0, 100)
        mapped = mmap.mmap(file.fileno(), 100)
        mapped[:3] = b"abc"
    assert (tmp_path / "x").read_bytes() == b"abc" + bytes(97)
    mapped.close()


def test_content_is_on_the_disk_before_the_name_and_then_the_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    with atomic_file(tmp_path / "x") as file:
        file.write(b"1")
    content, renamed, folder = done
    assert (content.startswith(f"{tmp_path}/.x."), renamed, folder) == (True, "rename", str(tmp_path))
    done.clear()
    with atomic_folder(tmp_path / "folder") as work:
        (work / "inner").mkdir()
        for name in ("a", "inner/b"):
            (work / name).write_bytes(b"1")
    assert set(done[:4]) == {str(work / name) for name in ("a", "inner/b", "inner")} | {str(work)}
    assert done[4:] == ["rename", str(tmp_path)]
    done.clear()
    with atomic_file(tmp_path / "cache", durable=False):
        pass
    assert done == ["rename"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_file(tmp_path / "x") as file:
        file.write(b"new")
    with pytest.raises(OSError, match="No space left"), atomic_folder(tmp_path / "folder"):
        pass
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path):
    target = tmp_path / "deep" / "folder"
    target.mkdir(parents=True)
    with atomic_folder(target) as work:
        (work / "x").write_bytes(b"1")
    assert os.listdir(target) == ["x"]
    for taken in (target, target / "x"):
        with pytest.raises(FileExistsError), atomic_folder(taken):
            pytest.fail("nothing is written for a target that is taken")
    assert os.listdir(tmp_path / "deep") == ["folder"]


def test_a_folder_that_is_filled_meanwhile_is_not_touched(tmp_path):
    target = tmp_path / "folder"

    def write():
        with atomic_folder(target) as work:
            (work / "x").write_bytes(b"ours")
            target.mkdir()
            (target / "x").write_bytes(b"another's")

    with pytest.raises(OSError, match="not empty"):
        write()
    assert (target / "x").read_bytes() == b"another's"
    assert os.listdir(tmp_path) == ["folder"]


KILLED = """
import os, signal, sys
from pathlib import Path
from gemkit.files import atomic_file, atomic_folder
path = Path(sys.argv[2])
if sys.argv[1] == "file":
    with atomic_file(path) as file:
        file.write(b"new" * 1000)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
else:
    with atomic_folder(path) as folder:
        (folder / "x").write_bytes(b"new")
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_writer_that_is_killed_leaves_the_target_as_it_was(tmp_path, what):
    target = tmp_path / "target"
    if what == "file":
        target.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, what, str(target)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path != target]
    assert len(left) == 1
    assert is_unfinished(left[0])
    assert is_unfinished(left[0], "target")
    assert not is_unfinished(left[0], "other")
    assert not is_unfinished(target)
    assert target.read_bytes() == b"old" if what == "file" else not target.exists()


def test_safetensors_are_those_of_the_library(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.arange(5, dtype=torch.uint8),
        "turned": torch.randn(3, 4, generator=generator).T,
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 2, dtype=torch.float16),
        "flags": torch.tensor([True, False, True]),
        "trained": torch.ones(2, requires_grad=True),
    }
    tensors["shared"] = tensors["turned"]
    with atomic_file(tmp_path / "x") as file:
        write_safetensors(file, tensors, {"format": "pt"})
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_safetensors_of_arrays_need_no_torch(tmp_path):
    program = """
import sys
import numpy as np
from gemkit.files import atomic_file, write_safetensors
with atomic_file(sys.argv[1]) as file:
    write_safetensors(file, {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.arange(3, dtype=np.int8)})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], check=True, timeout=60)
    read = load_file(tmp_path / "x")
    assert torch.equal(read["a"], torch.arange(6.0).view(2, 3).T)
    assert read["b"].tolist() == [0, 1, 2]


def test_every_dtype_of_the_table_has_its_size():
    for name, (size, torch_name) in files.DTYPES.items():
        assert getattr(torch, torch_name).itemsize == size, name
    with pytest.raises(KeyError):
        write_safetensors(io.BytesIO(), {"x": np.zeros(1, np.complex128)})


# ── text that people edit ───────────────────────────────────────────────────────────────────────────────────────────

TEXT = "größer\r\n\x0c二\u2028\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_as_editors_write_it(encoding):
    assert files.decode_text(TEXT.encode(encoding)) == TEXT
    assert files.decode_text(b"\xfe\xff" + TEXT.encode("utf-16-be")) == TEXT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\n größer".encode("latin-1"), r"byte 0xF6 in line 2 is not UTF-8 \(is it Latin-1 or Windows-1252\?\)"),
        ("hello".encode("utf-16-le"), r"a NUL byte at 1: .* UTF-16 without a mark\? Save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n" + b"\0", "NUL byte at 8: the file is damaged, or it is no text"),
        ("hello".encode("utf-32"), "it is UTF-32; save it as UTF-8"),
        ("hello".encode("utf-16")[:-1], "it is UTF-16 with a mistake at byte"),
    ],
)
def test_text_in_another_encoding_is_refused_by_name(data, message):
    with pytest.raises(TextError, match=message):
        files.decode_text(data)
