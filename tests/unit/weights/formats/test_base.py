"""What all readers share: telling formats apart, memory, and doing without torch."""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from gemkit.errors import WeightsError
from gemkit.weights.formats.base import File
from gemkit.weights.formats.gguf import GGUFReader
from gemkit.weights.formats.safetensors import SafetensorsReader
from gemkit.weights.formats.sniff import sniff


def in_a_fresh_process(code):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def files(tmp_path):
    """One of each format, under names that say nothing."""
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "a")
    (tmp_path / "b").write_bytes(b"GGUF" + b"\3" + b"\0" * 19)
    torch.save({"model_state_dict": {"x": torch.zeros(2)}}, tmp_path / "c")
    return tmp_path


def test_formats_are_told_by_content(files):
    assert [sniff(files / name) for name in "abc"] == ["safetensors", "gguf", "ckpt"]


@pytest.mark.parametrize(
    ("names", "format"),
    [
        (["config.json", "model.safetensors"], "safetensors"),
        (["model.safetensors.index.json"], "safetensors"),
        (["pytorch_model.bin", "model.safetensors"], "safetensors"),
        (["gemma.gguf"], "gguf"),
        (["gemma-2b.ckpt"], "ckpt"),
        (["pytorch_model.bin.index.json"], "ckpt"),
    ],
)
def test_folders_are_told_by_what_they_hold(tmp_path, names, format):
    for name in names:
        (tmp_path / name).touch()
    assert sniff(tmp_path) == format


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_is_told_by_its_name(tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"weight_map": {"x": "y"}}))
    assert sniff(tmp_path / name) == ("ckpt" if ".bin." in name else "safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"empty \(0 bytes\): an interrupted download\? Fetch it again"),
        (b"\n <!doctype HTML>", "a web page, not weights: a login or error page"),
        (b"<html>", "a web page"),
        (b'<?xml version="1.0"?><Error>AccessDenied', "a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a Git LFS pointer, not the weights themselves: run `git lfs pull`",
        ),
        (b"\x89HDF\r\n\x1a\n", r"an HDF5 file \(Keras weights\); safetensors, GGUF"),
        (pickle.dumps([1]), "a bare pickle, which can run code when it is loaded and is never opened"),
        (b"FUGG\3\0\0\0", "a byte-swapped GGUF file"),
        (b"hello world", "of an unknown format .it starts with b'hello wo'"),
        (b"{}", "of an unknown format"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_words(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        sniff(path)
    with pytest.raises(WeightsError):
        SafetensorsReader(path)
    with pytest.raises(WeightsError):
        GGUFReader(path)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(WeightsError, match="holds no safetensors, GGUF or"):
        sniff(tmp_path)
    with pytest.raises(WeightsError, match="no such file"):
        sniff(tmp_path / "absent.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(WeightsError, match="not a regular file"):  # opening it would wait for ever
        sniff(tmp_path / "pipe.gguf")


@pytest.mark.parametrize("reader", [GGUFReader, SafetensorsReader, sniff])
@pytest.mark.parametrize("content", [b"", b"<html>", b"GGU", b"GGUF" + b"\1" * 30, b"\2" + b"\0" * 7 + b"[]junk"])
def test_a_refused_file_is_not_left_open(tmp_path, reader, content):
    (tmp_path / "x").write_bytes(content)
    before = os.listdir("/proc/self/fd")
    if reader is sniff and content.startswith(b"GGUF"):
        assert sniff(tmp_path / "x") == "gguf"
    else:
        with pytest.raises(WeightsError):
            reader(tmp_path / "x")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_reading_past_the_end_is_an_error(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    file = File(tmp_path / "x")
    assert file.read(2, 1) == b"bc"
    with pytest.raises(WeightsError, match="changed while it was being read"):
        file.read(3, 1)
    file.close()


def test_headers_are_read_without_torch(files):
    out = in_a_fresh_process(f"""
        import sys
        from gemkit.weights.formats import torch_checkpoint
        from gemkit.weights.formats import base
        from gemkit.weights.formats import gguf
        from gemkit.weights.formats import safetensors
        from gemkit.weights.formats import shards
        from gemkit.weights.formats import sniff
        sniff.sniff({str(files / "a")!r})
        with safetensors.SafetensorsReader({str(files / "a")!r}) as reader:
            assert reader.entries["x"].shape == (2,)
        with gguf.GGUFReader({str(files / "b")!r}) as reader:
            assert reader.version == 3
        print("torch" in sys.modules)
    """)
    assert out == "False"


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    tensors = {f"t{i}": torch.ones(4 << 20, dtype=torch.bfloat16) for i in range(8)}
    safetensors.torch.save_file(tensors | {"small": torch.ones(32)}, tmp_path / "x.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma")
    for name, rows in (("small", 1), ("a", 40_000), ("b", 20_000)):
        blocks = np.zeros((rows, 1024 // 32 * 34), np.uint8)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = in_a_fresh_process(f"""
        import resource
        from gemkit.weights.formats.gguf import GGUFReader
        from gemkit.weights.formats.safetensors import SafetensorsReader

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

        def peak():
            return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

        for reader_class, path in (
            (SafetensorsReader, {str(tmp_path / "x.safetensors")!r}),
            (GGUFReader, {str(tmp_path / "x.gguf")!r}),
        ):
            with reader_class(path) as reader:
                reader.read("small")  # imports what reading imports
                before = resident()
                open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
                kept = [reader.read(name) for name in reader.entries]
                print((peak() - before) / sum(entry.nbytes for entry in reader.entries.values()))
    """)
    dense, quantized = map(float, out.split())
    assert 0.9 < dense < 1.2
    assert 0.9 < quantized < 1.2
