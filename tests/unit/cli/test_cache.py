"""`gemkit cache` lists, verifies and clears."""

import json

import pytest

from gemkit import cli
from gemkit.runtime import pack_cache
from gemkit.runtime.native import load_native
from gemkit.runtime.options import LoadOptions
from gemkit.weights.checkpoint import find
from support.tiny_models import write


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A packed model in a cache of its own."""
    monkeypatch.setenv("GEMKIT_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "model", "gemma-2b")
    with find(tmp_path / "model") as checkpoint:
        load_native(checkpoint, LoadOptions())
    (file,) = pack_cache.kept()
    return file


def test_a_list_says_of_what_and_how_large(kept, tmp_path, capsys):
    assert cli.main(["cache", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (model,) = report["models"]
    assert report["folder"] == str(tmp_path / "cache")
    assert model["of"] == [str(path) for path in (tmp_path / "model").glob("*.safetensors")]
    assert (model["path"], model["bytes"]) == (str(kept.path), kept.path.stat().st_size)
    assert cli.main(["cache"]) == 0
    assert "model.safetensors" in capsys.readouterr().out


def test_verify_removes_what_is_damaged(kept, capsys):
    assert cli.main(["cache", "verify"]) == 0
    assert "whole" in capsys.readouterr().out
    data = bytearray(kept.path.read_bytes())
    data[len(data) // 2] ^= 1
    kept.path.write_bytes(data)
    assert cli.main(["cache", "verify"]) == 1
    assert f"{kept.path}: 1 weights differ from their checksums, first layers" in capsys.readouterr().out
    assert not kept.path.exists()


def test_clear_removes_all(kept, capsys):
    assert cli.main(["cache", "clear"]) == 0
    assert "1 packed model removed" in capsys.readouterr().out
    assert pack_cache.kept() == []
    assert cli.main(["cache"]) == 0
